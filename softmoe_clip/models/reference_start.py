"""What google-research/vmoe does otherwise in its towers, for timm's modules: qk-norms, and how weights are drawn."""

from collections.abc import Iterable
from functools import partial
from math import sqrt

import torch
from timm.layers import AttentionPoolLatent, LayerNorm
from torch import nn

NORM = partial(LayerNorm, eps=1e-6)
QK_NORM = partial(LayerNorm, eps=1e-6, bias=False)


def drop_qk_bias(attentions: Iterable[nn.Module]) -> None:
    """Give attention layers and pools the reference's qk-norm, without a bias; timm has no setting that does it."""
    for attention in attentions:
        attention.q_norm, attention.k_norm = QK_NORM(attention.head_dim), QK_NORM(attention.head_dim)


@torch.no_grad()
def init_probe(pool: AttentionPoolLatent) -> None:
    """Draw the probe of a MAP head xavier_uniform."""
    nn.init.xavier_uniform_(pool.latent[0])


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
        if module.bias is None:  # by timm's qkv_bias or proj_bias
            continue
        nn.init.normal_(module.bias, std=1e-6) if "mlp." in name else nn.init.zeros_(module.bias)
