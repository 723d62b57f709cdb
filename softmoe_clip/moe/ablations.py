"""Soft MoE with a part of the routing taken away: the ablations of the paper's Table 2."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softmoe_clip.moe.experts import Experts
from softmoe_clip.moe.soft import Routing, SoftMoE


class SoftUniformMoE(SoftMoE):
    """Slots learn what to take in (soft dispatch); every token gets the plain mean of all results."""

    def route(self, tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Routing:
        """Take the layer's own dispatch weights, and equal combine weights."""
        soft = super().route(tokens, mask)
        return soft._replace(combine=mean_of_slots(real_tokens(tokens, mask), *soft.combine.shape[2:]))


class UniformSoftMoE(SoftMoE):
    """Every slot is the plain mean of all tokens; tokens learn which results to take (soft combine)."""

    def route(self, tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Routing:
        """Take equal dispatch weights, and the layer's own combine weights."""
        soft = super().route(tokens, mask)
        return soft._replace(dispatch=mean_of_tokens(real_tokens(tokens, mask), *soft.dispatch.shape[2:]))


class FixedMoE(SoftMoE):
    """A layer that learns no routing at all; its experts start apart, or nothing would ever tell them from another."""

    def __init__(self, width: int, num_experts: int, slots_per_expert: int = 1, hidden: int | None = None):
        super().__init__(width, num_experts, slots_per_expert, hidden)
        self.register_parameter("slot_embed", None)
        self.register_parameter("router_scale", None)
        draw_each_anew(self.experts)

    def extra_repr(self) -> str:
        return "num_experts={}, slots_per_expert={}".format(*self.slots)


class UniformMoE(FixedMoE):
    """Every slot is the plain mean of all tokens, and every token gets the plain mean of all results."""

    def route(self, tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Routing:
        """Give equal weights, both ways."""
        real = real_tokens(tokens, mask)
        return Routing(mean_of_tokens(real, *self.slots), mean_of_slots(real, *self.slots))


class IdentityMoE(FixedMoE):
    """Slot i is token i, so that expert floor(i / slots_per_expert) takes it.

    With fewer tokens than slots the last slots stay empty; more tokens than slots raise ValueError.
    """

    def route(self, tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Routing:
        """Give each token its own slot, the same one both ways."""
        num_tokens = tokens.shape[1]
        self.check_tokens(num_tokens)
        real = real_tokens(tokens, mask)
        e, s = self.slots
        own = real[..., None] * torch.eye(num_tokens, e * s, dtype=real.dtype, device=real.device)
        return Routing(*2 * [own.unflatten(2, self.slots)])

    def check_tokens(self, num_tokens: int) -> None:
        """Refuse more tokens than there are slots."""
        e, s = self.slots
        if num_tokens > e * s:
            raise ValueError(
                f"the router identity gives every token its own slot, but there are {num_tokens} tokens and {e * s} "
                f"slots: num_experts times slots_per_expert must be at least {num_tokens}"
            )


def real_tokens(tokens: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n"]:
    """Return 1 for a real token and 0 for padding, in the precision that routing is computed in."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    return tokens.new_ones(tokens.shape[:2], dtype=dtype) if mask is None else mask.to(dtype)


def mean_of_tokens(real: Float[Tensor, "b n"], num_experts: int, num_slots: int) -> Float[Tensor, "b n e s"]:
    """Give each slot the same share of every real token."""
    share = real / real.sum(1, keepdim=True).clamp(min=1)
    return share[..., None, None].expand(-1, -1, num_experts, num_slots)


def mean_of_slots(real: Float[Tensor, "b n"], num_experts: int, num_slots: int) -> Float[Tensor, "b n e s"]:
    """Give each real token the same share of every slot."""
    return (real / (num_experts * num_slots))[..., None, None].expand(-1, -1, num_experts, num_slots)


@torch.no_grad()
def draw_each_anew(experts: Experts) -> None:
    """Draw every expert's weights on their own, each as the reference draws the one it copies."""
    own = experts.own
    for kernels, biases in ((experts.w_in, experts.b_in), (experts.w_out, experts.b_out)):
        for number in range(experts.num_experts):  # those of other processes too, which have their turn in the draws
            nn.init.xavier_uniform_(kernels[number - own.start] if number in own else torch.empty_like(kernels[0]))
        drawn = nn.init.normal_(biases.new_empty(experts.num_experts, biases.shape[1]), std=1e-6)
        biases.copy_(drawn[own.start : own.stop])
