"""Sparse routers that balance the experts without a loss: a fixed hash, and optimal transport."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmoe_clip.moe.capacity import Rounding
from softmoe_clip.moe.tokens_choice import TokensChoiceMoE

HASH = 2_654_435_761  # 2**32 / golden ratio (Knuth): neighbours in a row or column of patches are torn apart
SINKHORN_STEPS = 30


class HashMoE(TokensChoiceMoE):
    """Each position belongs to one expert for ever (Hash Layers, arXiv 2106.04426, on positions instead of words).

    Nothing is learnt about routing, nothing is dropped, the weight is 1, and loads differ by one token at most.
    """

    def __init__(self, width: int, num_experts: int, hidden: int | None = None):
        super().__init__(width, num_experts, capacity_multiple_of=1, hidden=hidden)
        self.register_parameter("gate", None)

    def logits(self, tokens: Float[Tensor, "g m d"]) -> Float[Tensor, "g m e"]:
        """Give the softmax no choice: 0 for the position's expert, minus infinity for the others."""
        e, device = self.experts.w_in.shape[0], tokens.device
        own = hashed_experts(tokens.shape[1], e, device)[:, None] == torch.arange(e, device=device)
        scores = torch.zeros(own.shape, dtype=torch.promote_types(tokens.dtype, torch.float32), device=device)
        return scores.masked_fill(~own, -torch.inf).expand(tokens.shape[0], -1, -1)

    def aux_losses(
        self, logits: Float[Tensor, "g m e"], noisy: Float[Tensor, "g m e"]
    ) -> dict[str, Float[Tensor, " g"]]:
        """Need none."""
        return {}


class SinkhornMoE(TokensChoiceMoE):
    """Each token goes to its largest entry of a balanced transport plan (S-BASE of arXiv 2202.01169).

    The plan scales the gates until every expert gets equally much; the weight of the choice is the plain gate.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        capacity_factor: float = 1.0,
        capacity_rounding: Rounding = "ceil",
        capacity_multiple_of: int = 4,
        noise_std: float = 0.0,
        group_size: int = 1,
        hidden: int | None = None,
    ):
        super().__init__(
            width,
            num_experts,
            1,
            capacity_factor,
            capacity_rounding,
            capacity_multiple_of,
            noise_std=noise_std,
            group_size=group_size,
            hidden=hidden,
        )

    def choose(self, gates: Float[Tensor, "g m e"], num_slots: int) -> Bool[Tensor, "g m e s"]:
        """Let tokens queue up by the plan instead of the gates."""
        return super().choose(transport_plan(gates), num_slots)

    def aux_losses(
        self, logits: Float[Tensor, "g m e"], noisy: Float[Tensor, "g m e"]
    ) -> dict[str, Float[Tensor, " g"]]:
        """Need none."""
        return {}


def hashed_experts(num_tokens: int, num_experts: int, device: torch.device) -> Int[Tensor, " m"]:
    """Deal positions out to the experts in turn, in the order of their hashes: the same on every machine."""
    position = torch.arange(num_tokens, device=device)
    rank = (position * HASH % 2**32).argsort().argsort()
    return rank % num_experts


def transport_plan(gates: Float[Tensor, "g m e"]) -> Float[Tensor, "g m e"]:
    """Scale rows and columns in turn until each token gives 1 and each expert gets m / e (Sinkhorn), in logarithms."""
    m, e = gates.shape[1:]
    plan = gates.clamp(min=torch.finfo(gates.dtype).tiny).log()
    for _ in range(SINKHORN_STEPS):
        plan = plan.log_softmax(2)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan.exp() * (m / e)
