"""Experts Choice (arXiv 2202.09368): each expert takes the tokens that want it most; every slot is filled."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_clip.moe.sparse import SparseMoE, best


class ExpertsChoiceMoE(SparseMoE):
    """Experts Choice (arXiv 2202.09368): each expert takes the tokens with the largest gates, of equals the earlier.

    A token may go to many experts or to none. Loads are equal by construction, so there are no auxiliary losses. Sizes,
    capacity and noise are those of `SparseMoE`.
    """

    def choose(self, gates: Float[Tensor, "g m e"], num_slots: int) -> Bool[Tensor, "g m e s"]:
        """Fill each expert's slots with its best tokens, best first; more slots than tokens stay empty."""
        taken = best(gates, dim=1)[:, :num_slots]
        empty = gates.new_zeros(*gates.shape, num_slots, dtype=torch.bool)
        return empty.scatter(1, taken.transpose(1, 2)[:, None], True)
