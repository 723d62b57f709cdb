"""Sparse routers that balance the experts without a loss: a fixed hash, optimal transport, linear assignment."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmoe_clip.moe.balance import balanced_experts
from softmoe_clip.moe.sparse import SparseMoE, SparseRouting, best, queue_up

HASH = 2_654_435_761  # 2**32 / golden ratio (Knuth): neighbours in a row or column of patches are torn apart
SINKHORN_STEPS = 30


class HashMoE(SparseMoE):
    """Each position belongs to one expert for ever (Hash Layers, arXiv 2106.04426, on positions instead of words).

    Nothing is learnt about routing, nothing is dropped, the weight is 1, and loads differ by one token at most.
    """

    def __init__(self, width: int, num_experts: int, hidden: int | None = None):
        super().__init__(width, num_experts, capacity_multiple_of=1, hidden=hidden)
        self.register_parameter("gate", None)

    def logits(self, tokens: Float[Tensor, "g m d"]) -> Float[Tensor, "g m e"]:
        """Give the softmax no choice: 0 for the position's expert, minus infinity for the others."""
        e, device = self.num_experts, tokens.device
        own = hashed_experts(tokens.shape[1], e, device)[:, None] == torch.arange(e, device=device)
        scores = torch.zeros(own.shape, dtype=torch.promote_types(tokens.dtype, torch.float32), device=device)
        return scores.masked_fill(~own, -torch.inf).expand(tokens.shape[0], -1, -1)

    def choose(self, gates: Float[Tensor, "g m e"], num_slots: int) -> Bool[Tensor, "g m e s"]:
        """Let each token queue up at the one expert that it may go to."""
        return queue_up(best(gates, dim=2)[..., :1], gates.shape[2], num_slots)


class SinkhornMoE(SparseMoE):
    """Each token goes to its largest entry of a balanced transport plan (S-BASE of arXiv 2202.01169).

    The plan scales the gates until every expert gets equally much; the weight of the choice is the plain gate.
    """

    def choose(self, gates: Float[Tensor, "g m e"], num_slots: int) -> Bool[Tensor, "g m e s"]:
        """Let tokens queue up by the plan instead of the gates."""
        return queue_up(best(transport_plan(gates), dim=2)[..., :1], gates.shape[2], num_slots)


class BaseMoE(SparseMoE):
    """Tokens are shared out so that the sum of their scores is largest while experts get equally many (BASE layers).

    As in arXiv 2103.16716 the weight is the sigmoid of the score; the block adds the token itself. Where the tokens of
    a group do not divide by the experts, each expert gets one more or one less, and nothing is dropped. Evaluation
    does the same as training, where the paper lets each token choose for itself: a decoder's tokens must not know of
    later ones, but an image is there as a whole, and as a group of its own it never depends on its batch.
    """

    def __init__(self, width: int, num_experts: int, group_size: int = 1, hidden: int | None = None):
        super().__init__(width, num_experts, capacity_multiple_of=1, group_size=group_size, hidden=hidden)

    def route(self, tokens: Float[Tensor, "b n d"], noise: Float[Tensor, "_ _ e"] | None = None) -> SparseRouting:
        """Assign every token, in float32 at least; scores are learnt through the weights alone, without noise."""
        scores = self.logits(self.grouped(tokens))
        experts = balanced_experts(scores.detach())
        dispatch = queue_up(experts[..., None], scores.shape[2], self.num_slots(scores.shape[1]))
        return SparseRouting(dispatch, dispatch * scores.sigmoid()[..., None], {})


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
