"""A quick start for short runs: sharp routers, small patch kernels, positions told apart, quiet blocks.

The reference's start routes almost evenly, draws positions from a normal of 0.02, and lets patches and blocks speak at
full strength. All of it takes thousands of steps to settle, which a run of minutes on one's own pictures has not. What
a model can become is not changed.
"""

from math import sqrt

import torch
from torch import nn

from softmoe_clip.models.positions import sincos2d

ROUTER_SCALE = 12.0  # the reference starts from 1
LINEAR_STD = 0.02  # timm's own start; xavier, the reference's, is three to four times larger at the demo's width
# torch's own start of a convolution; the reference's lecun_normal drowns what is learnt for twice as long.
PATCH_GAIN = 1 / sqrt(3)
# About as long as what the patches give: enough to tell positions apart, too little to drown the picture.
POSITION_AMPLITUDE = 0.5


@torch.no_grad()
def start_quickly(model: nn.Module) -> None:
    """Draw the start of a model's timm image tower anew; ValueError for another kind of tower."""
    trunk = getattr(model.visual, "trunk", None)
    positions, grid = getattr(trunk, "pos_embed", None), getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if positions is None or positions.shape[1] != grid[0] * grid[1]:
        raise ValueError("model.start: quick needs a timm image tower with one position for each patch")
    positions.copy_(POSITION_AMPLITUDE * sincos2d(*grid, positions.shape[2]))
    trunk.patch_embed.proj.weight.mul_(PATCH_GAIN)
    for name, parameter in trunk.named_parameters():
        if name.endswith("router_scale"):
            parameter.fill_(ROUTER_SCALE)
    for module in trunk.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=LINEAR_STD)
            nn.init.zeros_(module.bias)
