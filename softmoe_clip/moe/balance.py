"""Share tokens out to experts so that all get equally many and the sum of scores is the largest there is."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Scores are compared in whole numbers, so that no rounding makes a detour look like a gain: steps per group's range.
GRID = 2**32
FAR = 2**46  # more than any chain of moves costs among 4,096 experts
PRICE_STEPS, PRICE_DECAY = 20, 0.8


class Moves(NamedTuple):
    """The cheapest move from each expert to each other, and who makes it: a token, or number m, an empty seat."""

    costs: Int[Tensor, "g e e"]
    movers: Int[Tensor, "g e e"]


# An operator of its own: its loops depend on the data, and a compiled or exported graph, or the meta device, sees one
# call. torch reads its schema from the annotations, so they are plain: scores (g, m, e) give experts (g, m).
@torch.library.custom_op("softmoe_clip::balanced_experts", mutates_args=())
def balanced_experts(scores: Tensor) -> Tensor:
    """Return each token's expert in the best balanced assignment of its group; loads differ by one token at most.

    Exact for scores rounded to 2**-32 of the largest difference between two scores of one token in the group.
    Everybody begins where it is best at prices that make the loads alike; then, while an expert is crowded, the
    cheapest chain of moves leads to a free seat (successive shortest paths): at most m chains of at most e moves. Which
    of equally good assignments is found depends on nothing else than the group's scores; of equally cheap moves the one
    to the lower expert, by the lower token, is made.
    """
    m, e = scores.shape[1:]
    costs = whole_costs(scores)
    prices = first_prices(costs)
    home = cheapest(costs, prices)
    # Each expert has m // e + 1 seats, and one of them stays empty at all but m % e experts: first where it is cheap.
    empty = prices.argsort(dim=1, stable=True).argsort(dim=1) < e - m % e
    while True:
        free_seats = m // e + 1 - taken_seats(home, empty)
        if (free_seats >= 0).all():
            return home
        moves = cheapest_moves(costs, home, empty)
        start = lowest((free_seats >= 0).long())[1]
        end, origins, distances = nearest(moves.costs - prices[:, :, None] + prices[:, None], start, free_seats > 0)
        prices = prices - torch.minimum(distances, distances.gather(1, end[:, None]))
        home, empty = move_along(moves.movers, origins, start, end, home, empty)


@balanced_experts.register_fake
def _(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[:2], dtype=torch.long)


def whole_costs(scores: Float[Tensor, "g m e"]) -> Int[Tensor, "g m e"]:
    """Say what a token loses by each expert but its favourite, in whole steps of the grid; 0 where that is NaN."""
    losses = scores.double().amax(2, keepdim=True) - scores
    return (losses / losses.amax((1, 2), keepdim=True) * GRID).round().nan_to_num(0, 0, 0).long()


def first_prices(costs: Int[Tensor, "g m e"]) -> Int[Tensor, "g e"]:
    """Make crowded experts dearer and idle ones cheaper, step by step: any prices will do, these save most chains."""
    g, m, e = costs.shape
    prices = costs.new_zeros(g, e)
    for number in range(PRICE_STEPS):
        loads = taken_seats(cheapest(costs, prices), torch.zeros_like(prices, dtype=torch.bool))
        prices = prices + (loads * e - m).clamp(max=m) * int(GRID * PRICE_DECAY**number / (4 * m))
    return prices


def cheapest(costs: Int[Tensor, "g m e"], prices: Int[Tensor, "g e"]) -> Int[Tensor, "g m"]:
    """Find each token's expert of the lowest cost and price together."""
    return lowest((costs + prices[:, None]).transpose(1, 2))[1]


def taken_seats(home: Int[Tensor, "g m"], empty: Bool[Tensor, "g e"]) -> Int[Tensor, "g e"]:
    """Count the tokens of each expert, and the seat that has to stay empty."""
    return empty.long().scatter_add(1, home, torch.ones_like(home))


def cheapest_moves(costs: Int[Tensor, "g m e"], home: Int[Tensor, "g m"], empty: Bool[Tensor, "g e"]) -> Moves:
    """Compare what the tokens of each expert would lose elsewhere; empty seats move for nothing, to where none is."""
    (g, m, e), here = costs.shape, home[..., None]
    # Costs and movers in one number, so that the lower of equal movers is found.
    keys = (costs - costs.gather(2, here)) * (m + 1) + torch.arange(m, device=costs.device)[:, None]
    best = costs.new_full((g, e, e), FAR * (m + 1)).scatter_reduce(1, here.expand(-1, -1, e), keys, "amin")
    best = torch.where(empty[:, :, None] & ~empty[:, None], best.clamp(max=m), best)
    return Moves(best // (m + 1), best % (m + 1))


def nearest(
    lengths: Int[Tensor, "g e e"], start: Int[Tensor, " g"], free: Bool[Tensor, "g e"]
) -> tuple[Int[Tensor, " g"], Int[Tensor, "g e"], Int[Tensor, "g e"]]:
    """Find the free expert nearest to `start` (Dijkstra), where each one was reached from, and all distances.

    A group without any free expert ends where it starts.
    """
    distances = torch.full_like(lengths[:, 0], FAR).scatter(1, start[:, None], 0)
    origins, done = torch.zeros_like(distances), torch.zeros_like(free)
    free = free | ~free.any(1, keepdim=True)
    while True:
        distance, expert = (found[:, None] for found in lowest(torch.where(done, 2 * FAR, distances)))
        arrived = free.gather(1, expert)
        if arrived.all():
            return expert.squeeze(1), origins, distances
        through = distance + lengths.take_along_dim(expert[..., None], 1).squeeze(1)
        shorter = through < distances
        distances, origins = torch.where(shorter, through, distances), torch.where(shorter, expert, origins)
        done = done.scatter(1, expert, ~arrived)


def move_along(
    movers: Int[Tensor, "g e e"],
    origins: Int[Tensor, "g e"],
    start: Int[Tensor, " g"],
    end: Int[Tensor, " g"],
    home: Int[Tensor, "g m"],
    empty: Bool[Tensor, "g e"],
) -> tuple[Int[Tensor, "g m"], Bool[Tensor, "g e"]]:
    """Make the moves of the chain that leads from start to end, the last one first."""
    group, m = torch.arange(len(home), device=home.device), home.shape[1]
    home, empty = home.clone(), empty.clone()
    while (on_the_way := end != start).any():
        origin = origins[group, end]
        mover = movers[group, origin, end]
        token, seat = on_the_way & (mover < m), on_the_way & (mover == m)
        home[group[token], mover[token]] = end[token]
        empty[group[seat], origin[seat]] = False
        empty[group[seat], end[seat]] = True
        end = torch.where(on_the_way, origin, end)
    return home, empty


def lowest(values: Int[Tensor, "g e *rest"]) -> tuple[Int[Tensor, "g *rest"], Int[Tensor, "g *rest"]]:
    """Return the smallest of dimension 1 and its place, the first of equal ones, which `min` does not promise."""
    number = values.shape[1]
    places = torch.arange(number, device=values.device).view(-1, *[1] * (values.ndim - 2))
    found = (values * number + places).amin(1)
    return found // number, found % number
