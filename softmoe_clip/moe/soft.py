"""The Soft MoE layer (arXiv 2308.00951), with the mathematics and initialisation of google-research/vmoe."""

from contextlib import AbstractContextManager, nullcontext
from math import prod, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softmoe_clip.moe import stats
from softmoe_clip.moe.expert_parallel import new_experts
from softmoe_clip.moe.products import bmm
from softmoe_clip.moe.weights import CosineLogits, MaskedSoftmax, inverse_norm

# Standard deviation of a standard normal cut at +-2: what JAX divides by so that the drawn numbers have the stated one.
TRUNCATED_STD = 0.87962566103423978


class Routing(NamedTuple):
    """Both sets of weights: b pictures of n tokens, e experts of s slots each; float32, float64 for float64 tokens.

    `dispatch` is what each slot takes of each token (sums to 1 over n), `combine` what each token takes of each slot
    (sums to 1 over e and s). A masked token has zeros in both.
    """

    dispatch: Float[Tensor, "b n e s"]
    combine: Float[Tensor, "b n e s"]


class SoftMoE(nn.Module):
    """A Soft MoE layer (arXiv 2308.00951): `layer(tokens (b, n, d), mask (b, n) or None)` gives (b, n, d).

    Each slot is a weighted mean of all tokens and goes through its expert; each token is such a mean of the results.
    `width` is d, `num_experts` e, `slots_per_expert` s, and `hidden` the hidden size f of an expert, 4 * width without
    it. `normalize` divides tokens and slot embeddings by their lengths before they are compared. `activation` is the
    experts': gelu_tanh (the reference's), gelu or quick_gelu. Learnt are slot_embed (d, e, s), router_scale () and
    those of `experts`. Raises ValueError for a size below 1, or an unknown activation.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        slots_per_expert: int = 1,
        hidden: int | None = None,
        normalize: bool = True,
        activation: str = "gelu_tanh",
    ):
        super().__init__()
        self.normalize = normalize
        self.slots = num_experts, slots_per_expert
        self.label = "soft_moe"  # what routing statistics call this layer; `install` sets it
        self.slot_embed = nn.Parameter(lecun_normal(width, num_experts, slots_per_expert))
        self.router_scale = nn.Parameter(torch.ones(()))
        self.experts = new_experts(num_experts, width, 4 * width if hidden is None else hidden, activation)

    def route(self, tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Routing:
        """Compute both sets of weights, in float32 at least, from tokens (b, n, d).

        `mask` (b, n) is True for a real token; a masked one gives and takes nothing, all masked give zeros.
        """
        logits = self.logits(without_padding(tokens, mask))
        if mask is None:
            dispatch, combine = logits.softmax(dim=1), logits.softmax(dim=2)
        else:
            dispatch, combine = (MaskedSoftmax.apply(logits, mask, dim) for dim in (1, 2))
        per_expert = self.slot_embed.shape[1:]
        return Routing(dispatch.unflatten(2, per_expert), combine.unflatten(2, per_expert))

    def logits(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n slots"]:
        """Scaled cosine of every token with every slot embedding (a plain product where `normalize` is off)."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with without_autocast(tokens.device.type):
            slots = self.slot_embed.flatten(1).to(dtype)
            if not self.normalize:
                return tokens.to(dtype) @ (slots * self.router_scale)
            return CosineLogits.apply(tokens, slots * (inverse_norm(slots, 0) * self.router_scale))

    def forward(
        self, tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Mix the raw tokens into slots (they are normalised for the logits only), run the experts, mix back.

        The result has the tokens' shape; where `mask` is False it is 0.
        """
        routing = self.route(tokens, mask)
        dispatch, combine = (weights.flatten(2).to(tokens.dtype) for weights in routing)
        slots = bmm(dispatch.transpose(1, 2), without_padding(tokens, mask))
        if stats.is_collecting():
            stats.report(self.label, routing.dispatch, routing.combine, slots, self.router_scale, mask)
        slots = self.experts(slots.unflatten(1, routing.dispatch.shape[2:]))
        return bmm(combine, slots.flatten(1, 2).contiguous())

    @property
    def c_fc(self) -> "WithWeight":
        """Stand in for the first linear layer: open_clip reads a tower's dtype from `mlp.c_fc.weight` of block 0."""
        return WithWeight(next(self.experts.parameters()))

    def extra_repr(self) -> str:
        d, e, s = self.slot_embed.shape
        return f"width={d}, num_experts={e}, slots_per_expert={s}, normalize={self.normalize}"


class WithWeight(NamedTuple):
    """Something that has a weight."""

    weight: Tensor


def without_autocast(device: str) -> AbstractContextManager:
    """Turn autocast off on a device that has it (meta has not)."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def without_padding(tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n d"]:
    """Zero the masked tokens, so that not even a NaN in the padding reaches a real one."""
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0)


def lecun_normal(*shape: int) -> Float[Tensor, "*shape"]:
    """Draw as jax.nn.initializers.lecun_normal does: the fan-in is every axis but the last (width * num_experts)."""
    if min(shape) < 1:
        raise ValueError(
            f"width, number of experts and slots per expert count from 1, got {', '.join(map(str, shape))}"
        )
    std = sqrt(1 / prod(shape[:-1])) / TRUNCATED_STD
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-2 * std, b=2 * std)
