"""Tokens Choice (V-MoE, arXiv 2106.05974): each token goes to its best experts, as long as they have room."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_clip.moe.capacity import Rounding
from softmoe_clip.moe.sparse import SparseMoE, best, queue_up


class TokensChoiceMoE(SparseMoE):
    """V-MoE's layer (arXiv 2106.05974): each token chooses its `top_k` experts; who comes to a full one is dropped.

    All first choices come before any second one; among them earlier tokens come first, or with `bpr` (batch-priority
    routing) those with the largest gate. At equal gates the lower number wins. Sizes, capacity and noise are those of
    `SparseMoE`. Raises ValueError for a `top_k` that is not between 1 and `num_experts`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int = 1,
        capacity_factor: float = 1.0,
        capacity_rounding: Rounding = "ceil",
        capacity_multiple_of: int = 4,
        bpr: bool = False,
        noise_std: float = 0.0,
        group_size: int = 1,
        hidden: int | None = None,
    ):
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and the {num_experts} experts, got {top_k}")
        super().__init__(
            width, num_experts, capacity_factor, capacity_rounding, capacity_multiple_of, noise_std, group_size, hidden
        )
        self.top_k, self.bpr = top_k, bpr

    def choose(self, gates: Float[Tensor, "g m e"], num_slots: int) -> Bool[Tensor, "g m e s"]:
        """Let the tokens queue up, first choices before second ones, until the slots are full."""
        order = best(gates.amax(2), dim=1) if self.bpr else None
        return queue_up(best(gates, dim=2)[..., : self.top_k], gates.shape[2], num_slots, order)

    def aux_losses(
        self, logits: Float[Tensor, "g m e"], noisy: Float[Tensor, "g m e"]
    ) -> dict[str, Float[Tensor, " g"]]:
        """Compute the importance loss, gshard's (arXiv 2006.16668), and with noise the load loss, one number a group.

        importance: how much the experts' summed gates differ; load: how much their chances to be chosen differ, were
        the noise drawn again; gshard: share of first choices times mean gate, 1 where both are even.
        """
        e = logits.shape[2]
        gates = noisy.softmax(2)
        firsts = (best(gates, dim=2)[..., :1] == torch.arange(e, device=gates.device)).sum(1)
        # As the reference computes it, whatever the gates' precision: a float32 count times a float32 reciprocal.
        share = firsts.float() * (1 / gates.shape[1])
        losses = {
            "importance": squared_variation(logits.softmax(2).sum(1)),
            "gshard": e**2 * (share * gates.mean(1)).mean(1),
        }
        if noisy is not logits:
            threshold = noisy.gather(2, best(noisy, dim=2)[..., self.top_k - 1 : self.top_k])
            chance = torch.special.ndtr((logits - threshold) / (self.noise_std / e))
            losses["load"] = squared_variation(chance.mean(1))
        return losses


def squared_variation(loads: Float[Tensor, "g e"]) -> Float[Tensor, " g"]:
    """Variance over squared mean; taken from the variance, since a deviation has no gradient at equal loads."""
    return loads.var(1, unbiased=False) / loads.mean(1).square()
