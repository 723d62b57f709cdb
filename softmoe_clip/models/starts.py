"""Starts for short runs: routers that are sharp and positions that are told apart from the first step.

The reference's start routes almost evenly and draws positions from a normal of 0.02; both take thousands of steps to
grow, which a run of minutes on one's own pictures has not. Neither changes what a model can become.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

# Half the length of the patches' own vectors, about: enough to tell positions apart, too little to drown the picture.
POSITION_AMPLITUDE = 0.5


@torch.no_grad()
def start_routers(model: nn.Module, router_scale: float) -> None:
    """Set every router_scale of a model (the reference starts from 1)."""
    for name, parameter in model.named_parameters():
        if name.endswith("router_scale"):
            parameter.fill_(router_scale)


@torch.no_grad()
def start_positions(model: nn.Module) -> None:
    """Let the learned positions of a timm image tower start from a sine-cosine table; other towers are refused."""
    trunk = getattr(model.visual, "trunk", None)
    positions, grid = getattr(trunk, "pos_embed", None), getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if positions is None or positions.shape[1] != grid[0] * grid[1]:
        raise ValueError("init_positions: sincos2d needs a timm image tower with one position for each patch")
    positions.copy_(POSITION_AMPLITUDE * sincos2d(*grid, positions.shape[2]))


def sincos2d(height: int, width: int, channels: int) -> Float[Tensor, "n d"]:
    """Compute [sin x, cos x, sin y, cos y] of each patch, as google-research/vmoe's sincos2d positions."""
    omega = 10_000 ** -(torch.arange(channels // 4) / (channels // 4 - 1))
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
