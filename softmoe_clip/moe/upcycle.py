"""Turn the MLPs of a trained tower into experts: where they stand, every expert starts as the MLP that stood there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.moe.centroids import slots_from_tokens
from softmoe_clip.moe.experts import ACTIVATIONS, Experts
from softmoe_clip.moe.install import chosen_blocks, install, tower_blocks, tower_label, two_linears
from softmoe_clip.moe.shared import SharedExpert

Mode = Literal["copy", "noise", "shared", "centroids"]
# Of each matrix's own spread: tells experts apart at once, where slots alone do it slowly.
NOISE = 0.1
# The activation of an MLP is `act` in timm, `gelu` in open_clip.
ACTIVATION_NAMES = ("act", "gelu")


@torch.no_grad()
def upcycle_tower(
    tower: nn.Module,
    config: MoEConfig,
    mode: Mode = "copy",
    seed: int = 0,
    show_examples: Callable[[], object] | None = None,
) -> MoEConfig:
    """Put Soft MoE layers in place of trained MLPs, in place, and return the config that `install` needs at loading.

    `copy`: every expert is the MLP, its activation included. `noise`: the same with noise on each expert's matrices.
    `centroids`: copies whose slots start at centroids of the tokens that come when `show_examples` runs the tower.
    `shared`: the MLP stays and the experts, whose first layers are copies, add zero at first: the tower computes what
    it did. In the other modes it does not, since slots mix tokens. Raises ValueError before anything is changed.
    """
    blocks = tower_blocks(tower)
    dense = {i: blocks[i].mlp for i in chosen_blocks(config, len(blocks), tower_label(tower))}
    linears = {i: two_linears(mlp, i) for i, mlp in dense.items()}
    config = replace(config, activation=common_activation(dense), shared_expert=mode == "shared")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        install(tower, config)
    generator = torch.Generator().manual_seed(seed)
    for i, (first, second) in linears.items():
        layer = blocks[i].mlp
        experts = layer.routed.experts if isinstance(layer, SharedExpert) else layer.experts
        copy_linear(experts.w_in, experts.b_in, first)
        if mode != "shared":
            copy_linear(experts.w_out, experts.b_out, second)
        if mode == "noise":
            add_noise(experts, generator)
    if mode == "centroids":
        with slots_from_tokens({blocks[i].mlp: mlp for i, mlp in dense.items()}, seed):
            show_examples()
    return config


def copy_linear(weights: nn.Parameter, biases: nn.Parameter, linear: nn.Linear) -> None:
    """Give every expert the weights of one linear layer; without a bias there, the experts' starts at zero."""
    weights.copy_(linear.weight.T.expand_as(weights))
    biases.zero_() if linear.bias is None else biases.copy_(linear.bias.expand_as(biases))


def add_noise(experts: Experts, generator: torch.Generator) -> None:
    """Move each expert's matrices away from the common one by NOISE of its standard deviation."""
    for weights in (experts.w_in, experts.w_out):
        std = NOISE * weights[0].std()
        for weight in weights:  # one by one: all of them again would double the memory
            weight.add_(std * torch.randn(weight.shape, generator=generator).to(weight))


def common_activation(mlps: dict[int, nn.Module]) -> str:
    """Return the name of the activation that all these MLPs have."""
    names = {activation_name(mlp, i) for i, mlp in mlps.items()}
    if len(names) > 1:
        raise ValueError(f"the chosen blocks have different activations ({', '.join(sorted(names))}): upcycle fewer")
    return names.pop()


def activation_name(mlp: nn.Module, block: int) -> str:
    """Find which of our activations an MLP computes, by trying."""
    activation = next((getattr(mlp, name) for name in ACTIVATION_NAMES if hasattr(mlp, name)), nn.Identity())
    probe = torch.linspace(-4, 4, 65, dtype=torch.float64)
    for name, function in ACTIVATIONS.items():
        if torch.allclose(activation(probe), function(probe), rtol=0, atol=1e-9):
            return name
    raise ValueError(
        f"the MLP of block {block} has the activation {type(activation).__name__}, and experts have only "
        f"{', '.join(ACTIVATIONS)}: choose another tower"
    )
