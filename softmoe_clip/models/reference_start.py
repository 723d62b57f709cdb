"""How google-research/vmoe draws the linear layers of its towers, for timm's modules."""

from math import sqrt

import torch
from torch import nn


@torch.no_grad()
def init_linears_like_reference(tower: nn.Module) -> None:
    """Draw every matrix xavier_uniform, the biases of MLPs normal(1e-6); all other biases are zero."""
    for name, module in tower.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(("attn.qkv", "attn_pool.kv")):  # query, key and value are matrices of their own there
            bound = sqrt(3 / module.in_features)
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(module.bias, std=1e-6) if "mlp." in name else nn.init.zeros_(module.bias)
