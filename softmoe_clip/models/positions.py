"""Fixed positions of patches, for towers that learn none and for starts that should tell places apart."""

import torch
from jaxtyping import Float
from torch import Tensor


def sincos2d(
    height: int, width: int, channels: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Float[Tensor, "n d"]:
    """Compute [sin x, cos x, sin y, cos y] of each patch, row by row, as google-research/vmoe's sincos2d positions."""
    if channels % 4 or channels < 8:
        raise ValueError(f"sincos2d positions need a width of at least 8 that 4 divides, got {channels}")
    # Half precision cannot hold the larger angles.
    exact = torch.promote_types(dtype, torch.float32)
    omega = 10_000 ** -(torch.arange(channels // 4, dtype=exact, device=device) / (channels // 4 - 1))
    y, x = torch.meshgrid(*(torch.arange(side, device=device) for side in (height, width)), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).to(dtype)
