"""What the sparse routers share: a gate, routing groups, slots of a limited number, tokens moved by index."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softmoe_clip.moe import stats
from softmoe_clip.moe.capacity import Rounding, slots_per_group
from softmoe_clip.moe.expert_parallel import new_experts
from softmoe_clip.moe.soft import WithWeight, lecun_normal, without_autocast


class SparseRouting(NamedTuple):
    """Which token each slot holds (one or none), and with what weight the result goes back to it.

    g groups of m tokens; with `group_size` 1 these are the images and their tokens. A token without a slot gets zeros.
    `aux_losses` are one number a group, not yet weighted; they keep the experts' loads alike.
    """

    dispatch: Bool[Tensor, "g m e s"]
    combine: Float[Tensor, "g m e s"]
    aux_losses: dict[str, Float[Tensor, " g"]]


class SparseMoE(nn.Module):
    """A layer whose experts take whole tokens; `choose` says which. `layer(tokens (b, n, d))` gives (b, n, d).

    The weight of a choice is its gate, unscaled; a token that no expert takes gives zeros. `group_size` pictures, of m
    tokens in all, are routed together: there each expert has m * top_k * `capacity_factor` / `num_experts` slots, made
    whole by `capacity_rounding` and raised to a multiple of `capacity_multiple_of`. In training normal noise of
    `noise_std` / `num_experts` is added to the logits. `hidden` is 4 * `width` without it.
    """

    top_k = 1  # choices a token makes; Tokens Choice sets its own
    draw_noise = staticmethod(torch.randn_like)  # from torch's own generator; a training run sets another

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
        super().__init__()
        self.label = type(self).__name__  # what routing statistics call this layer; `install` sets it
        self.capacity = capacity_factor, capacity_rounding, capacity_multiple_of
        self.noise_std, self.group_size = noise_std, group_size
        self.aux_weights: dict[str, float] = {}
        self.gate = nn.Parameter(lecun_normal(width, num_experts))
        self.num_experts = num_experts
        self.experts = new_experts(num_experts, width, 4 * width if hidden is None else hidden)

    def route(self, tokens: Float[Tensor, "b n d"], noise: Float[Tensor, "_ _ e"] | None = None) -> SparseRouting:
        """Let tokens and experts find each other, in float32 at least.

        `noise` is standard normal, one number for each token and expert; in training `draw_noise` draws it. In
        evaluation there is none unless it is given.
        """
        logits = self.logits(self.grouped(tokens))
        if noise is None and self.training and self.noise_std > 0:
            noise = self.draw_noise(logits)
        noisy = logits
        if noise is not None and self.noise_std > 0:
            noisy = logits + noise.to(logits).reshape(logits.shape) * (self.noise_std / logits.shape[2])
        gates = noisy.softmax(dim=2)
        # A smaller group, which only evaluation meets, gets its share of the slots, rounded up.
        num_images = self.images_per_group(tokens)
        num_slots = -(-self.num_slots(self.group_size * tokens.shape[1]) * num_images // self.group_size)
        dispatch = self.choose(gates.detach(), num_slots)
        return SparseRouting(dispatch, dispatch * gates[..., None], self.aux_losses(logits, noisy))

    def choose(self, gates: Float[Tensor, "g m e"], num_slots: int) -> Bool[Tensor, "g m e s"]:
        """Fill the slots of every expert with tokens."""
        raise NotImplementedError

    def aux_losses(
        self, logits: Float[Tensor, "g m e"], noisy: Float[Tensor, "g m e"]
    ) -> dict[str, Float[Tensor, " g"]]:
        """Measure how unevenly the experts are used; nothing where the router balances them by itself."""
        return {}

    def grouped(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "g m d"]:
        """Put the tokens of `group_size` images into one group.

        In evaluation, where the last batch may be any number of images, they are cut into the largest equal groups
        that hold a divisor of `group_size`; in training that raises ValueError.
        """
        b, n, d = tokens.shape
        size = self.images_per_group(tokens)
        if self.training and size != self.group_size:
            raise ValueError(f"a batch of {b} images does not divide into routing groups of {self.group_size}")
        return tokens.reshape(b // size, size * n, d)

    def images_per_group(self, tokens: Float[Tensor, "b n d"]) -> int:
        """Return `group_size`, or the largest divisor of it that cuts a batch into equal groups."""
        # math.gcd would break a compiled graph, and fix the batch of an exported one.
        for size in range(self.group_size, 1, -1):
            if self.group_size % size == 0 and tokens.shape[0] % size == 0:
                return size
        return 1

    def logits(self, tokens: Float[Tensor, "g m d"]) -> Float[Tensor, "g m e"]:
        """Score every token for every expert."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with without_autocast(tokens.device.type):
            return tokens.to(dtype) @ self.gate.to(dtype)

    def num_slots(self, num_tokens: int) -> int:
        """Count the slots of one expert in a whole group of so many tokens; ValueError where there would be none."""
        return slots_per_group(num_tokens * self.top_k, self.num_experts, *self.capacity)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Copy tokens into slots, run the experts, add the weighted results up where the tokens came from."""
        routing, grouped = self.route(tokens), self.grouped(tokens)
        stats.report_losses(self.label, routing.aux_losses, self.aux_weights)
        if stats.is_collecting():
            with torch.no_grad():  # saves nothing for backward, see stats.report
                clean = self.logits(grouped).softmax(2)
            stats.report_sparse(self.label, routing.dispatch, clean, routing.aux_losses)
        g, m, d = grouped.shape
        # By index, since (m, e, s) matrices would cost as much as the experts; the test holds the einsums it equals.
        filled, token = routing.dispatch.byte().max(dim=1)
        rows = (token + m * torch.arange(g, device=token.device)[:, None, None]).flatten()
        slots = grouped.reshape(g * m, d).index_select(0, rows).view(*token.shape, d) * filled[..., None]
        results = self.experts(slots)
        weighted = results * routing.combine.sum(1)[..., None]  # a slot holds one token, so the sum is its weight
        mixed = weighted.new_zeros(g * m, d).index_add(0, rows, weighted.reshape(-1, d))
        return mixed.view(tokens.shape).to(results.dtype)

    @property
    def c_fc(self) -> "WithWeight":
        """Stand in for the first linear layer: open_clip reads a tower's dtype from `mlp.c_fc.weight` of block 0."""
        return WithWeight(next(self.experts.parameters()))

    def extra_repr(self) -> str:
        factor, rounding, multiple_of = self.capacity
        return (
            f"num_experts={self.num_experts}, top_k={self.top_k}, "
            f"capacity={rounding}({factor}) of {multiple_of}, noise_std={self.noise_std}, group_size={self.group_size}"
        )


def routed_together(tower: nn.Module) -> SparseMoE | None:
    """Find a layer in which a picture's output depends on its neighbours: one that routes several of them at once."""
    layers = (layer for layer in tower.modules() if isinstance(layer, SparseMoE))
    return next((layer for layer in layers if layer.group_size > 1), None)


def best(values: Float[Tensor, "*shape"], dim: int) -> Tensor:
    """Sort places by value, largest first; at equal values the lower place comes first, which topk does not promise."""
    return values.detach().argsort(dim=dim, descending=True, stable=True)


def queue_up(
    choices: Int[Tensor, "g m k"], num_experts: int, num_slots: int, order: Int[Tensor, "g m"] | None = None
) -> Bool[Tensor, "g m e s"]:
    """Give the slots out in order: all tokens' first choices, then their second ones; who comes too late gets none.

    Tokens stand in line as `order` lists them, without it by their number.
    """
    (g, m, k), e, device = choices.shape, num_experts, choices.device
    order = torch.arange(m, device=device).expand(g, m) if order is None else order
    expert = choices.gather(1, order[..., None].expand_as(choices)).transpose(1, 2).flatten(1)
    token = order.repeat(1, k)
    queues = expert[..., None] == torch.arange(e, device=device)
    place = queues.cumsum(1).gather(2, expert[..., None]).squeeze(2) - 1
    # Whoever finds no slot is written behind the end, which is cut off: shapes do not depend on the data.
    slot = torch.where(place < num_slots, (token * e + expert) * num_slots + place, m * e * num_slots)
    filled = torch.zeros(g, m * e * num_slots + 1, dtype=torch.bool, device=device).scatter(1, slot, True)
    return filled[:, :-1].view(g, m, e, num_slots)
