"""Experts Choice (arXiv 2202.09368): each expert takes the tokens that want it most; every slot is filled."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_clip.moe.capacity import Rounding
from softmoe_clip.moe.sparse import SparseMoE


class ExpertsChoiceMoE(SparseMoE):
    """Each expert takes the tokens with the largest gates for it, the earlier of equal ones first.

    A token may go to many experts or to none. Loads are equal by construction, so there are no auxiliary losses.
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
            width, num_experts, capacity_factor, capacity_rounding, capacity_multiple_of, noise_std, group_size, hidden
        )

    def choose(self, gates: Float[Tensor, "g m e"], num_slots: int) -> Bool[Tensor, "g m e s"]:
        """Fill each expert's slots with its best tokens, best first; more slots than tokens stay empty."""
        best = gates.argsort(dim=1, descending=True, stable=True)[:, :num_slots]
        empty = gates.new_zeros(*gates.shape, num_slots, dtype=torch.bool)
        return empty.scatter(1, best.transpose(1, 2)[:, None], True)
