"""Slots that start where a layer's tokens are: their centroids, with the router as sharp as keeps most of the MLP."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softmoe_clip.moe.soft import SoftMoE

SCALES = (5.0, 10.0, 14.0, 20.0, 28.0, 40.0, 56.0, 80.0)
NUM_ROUNDS = 10


@contextmanager
def slots_from_tokens(dense: dict[SoftMoE, nn.Module], seed: int = 0) -> Iterator[None]:
    """Set the slots of each layer from the first tokens that reach it in this context, given the MLP it replaces.

    One pass through the tower sets them all: a layer sees tokens that the layers before it, already set, have made.
    """
    hooks = []

    def set_once(mlp: nn.Module, layer: SoftMoE, arguments: tuple) -> None:
        if layer in unset:
            unset.remove(layer)
            set_slots(layer, mlp, *arguments, seed=seed)

    unset = set(dense)
    try:
        hooks += [layer.register_forward_pre_hook(partial(set_once, mlp)) for layer, mlp in dense.items()]
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def set_slots(
    layer: SoftMoE,
    mlp: nn.Module,
    tokens: Float[Tensor, "b n d"],
    mask: Bool[Tensor, "b n"] | None = None,
    seed: int = 0,
) -> None:
    """Put slots at centroids of the tokens, and choose the router scale with which the layer is nearest to the MLP."""
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask
    num_experts, slots_per_expert = layer.slot_embed.shape[1:]
    found = centroids(tokens[mask], num_experts * slots_per_expert, seed)
    # As long as fresh slots are: with Adam's steps, a slot turns the faster the shorter it is.
    layer.slot_embed.copy_(found.T.unflatten(1, (num_experts, slots_per_expert)) / num_experts**0.5)
    wanted, errors = mlp(tokens)[mask], {}
    for scale in SCALES:
        layer.router_scale.fill_(scale)
        errors[scale] = (layer.forward(tokens, mask)[mask] - wanted).square().mean().item()
    layer.router_scale.fill_(min(errors, key=errors.get))


def centroids(tokens: Float[Tensor, "n d"], num_centroids: int, seed: int = 0) -> Float[Tensor, "k d"]:
    """Cluster tokens by direction (spherical k-means), and return unit vectors; a cluster left empty stays put."""
    if len(tokens) < num_centroids:
        raise ValueError(
            f"{num_centroids:,} centroids need as many tokens, and {len(tokens):,} were seen: "
            "give more pictures, with captions for a text tower, or take fewer slots"
        )
    tokens = nn.functional.normalize(tokens, dim=-1)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    found = tokens[order[:num_centroids].to(tokens.device)]
    for _ in range(NUM_ROUNDS):
        nearest = (tokens @ found.T).argmax(1)
        sums = torch.zeros_like(found).index_add_(0, nearest, tokens)
        filled = torch.bincount(nearest, minlength=num_centroids) > 0
        found = torch.where(filled[:, None], nn.functional.normalize(sums, dim=-1), found)
    return found
