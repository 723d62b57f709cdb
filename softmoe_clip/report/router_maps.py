"""What a Soft MoE layer looks at: its routing weights, caught by hooks while pictures pass."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image


class LayerMaps(NamedTuple):
    """Routing of one layer over b pictures; y and x count patches, prefix tokens are left out.

    dispatch (b, e, s, y, x): how much of each patch a slot takes in (over patches, and prefix tokens, it sums to 1).
    combine (b, e, y, x): how much of each patch's output comes from an expert (over experts it sums to 1).
    prefix (b, e, s): the dispatch weight that went to class and register tokens.
    """

    layer: str
    dispatch: np.ndarray
    combine: np.ndarray
    prefix: np.ndarray


def router_maps(model, images: Sequence[Image.Image], transform) -> list[LayerMaps]:
    """Run pictures through the image tower and return the routing of each of its Soft MoE layers, first to last.

    `model` is an open_clip model or a LoadedModel. The list is empty where the tower holds no Soft MoE layer.
    """
    import torch

    model = getattr(model, "model", model)
    parameter = next(model.parameters())
    pixels = torch.stack([transform(image) for image in images]).to(parameter.device, parameter.dtype)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), caught_tokens(model.visual) as caught:
            model.encode_image(pixels)
            routings = [(name, layer.route(tokens)) for name, layer, tokens in caught]
    finally:
        model.train(was_training)
    if not routings:  # a tower of any kind, which may have no patches at all
        return []
    grid, num_prefix = patch_grid(model.visual)
    return [to_maps(name, routing, grid, num_prefix) for name, routing in routings]


@contextmanager
def caught_tokens(tower):
    """Collect (name, layer, input tokens) of every Soft MoE layer of a tower while the block runs."""
    from softmoe_clip.moe.soft import SoftMoE

    caught = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: caught.append((name, layer, args[0])))
        for name, layer in tower.named_modules()
        if isinstance(layer, SoftMoE)
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def patch_grid(tower) -> tuple[tuple[int, int], int]:
    """The (rows, columns) of patches of a timm or native open_clip tower, and its number of tokens before them."""
    trunk = getattr(tower, "trunk", None)
    if trunk is not None:
        return tuple(trunk.patch_embed.grid_size), trunk.num_prefix_tokens
    return tuple(tower.grid_size), 1


def to_maps(name: str, routing, grid: tuple[int, int], num_prefix: int) -> LayerMaps:
    """Lay the routing weights of the patches out as pictures."""
    dispatch, combine = (weights.float().cpu().numpy() for weights in (routing.dispatch, routing.combine))
    dispatch = np.moveaxis(dispatch, 1, -1)
    combine = np.moveaxis(combine.sum(-1), 1, -1)
    prefix, dispatch = dispatch[..., :num_prefix].sum(-1), dispatch[..., num_prefix:]
    patches = combine[..., num_prefix:]
    return LayerMaps(
        name, dispatch.reshape(*dispatch.shape[:-1], *grid), patches.reshape(*patches.shape[:-1], *grid), prefix
    )


def layer_title(name: str) -> str:
    """Name a layer by its block: "Block 6" for `trunk.blocks.6.mlp` (blocks count from 0, as in the config)."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return f"Block {numbers[-1]}" if numbers else name


def telling_slots(maps: LayerMaps, count: int) -> list[tuple[int, int]]:
    """Choose (expert, slot) pairs to show: sharp maps first, and each unlike the ones before it."""
    b, e, s = maps.dispatch.shape[:3]
    flat = maps.dispatch.reshape(b, e * s, -1).astype(np.float64)
    share = flat / np.maximum(flat.sum(-1, keepdims=True), 1e-12)
    sharpness = (share * np.log(np.maximum(share * share.shape[-1], 1e-12))).sum(-1).mean(0)
    shape = (share - share.mean(-1, keepdims=True)).transpose(1, 0, 2).reshape(e * s, -1)
    shape /= np.maximum(np.linalg.norm(shape, axis=1, keepdims=True), 1e-12)
    chosen: list[int] = []
    likeness = np.zeros(e * s)
    for _ in range(min(count, e * s)):
        worth = sharpness * (1 - likeness)
        worth[chosen] = -np.inf
        chosen.append(int(worth.argmax()))
        likeness = np.maximum(likeness, shape @ shape[chosen[-1]])
    return [divmod(slot, s) for slot in chosen]
