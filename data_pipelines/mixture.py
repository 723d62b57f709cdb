"""Several sources in one order, by weight: which source stands at which position, again a pure function."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.order import (
    BLOCK_KEYS,
    SOURCE_SEED,
    WindowedOrder,
    mixing,
    permuted,
    round_keys,
    substitute_at,
)

BLOCK = 1000  # positions in which every source has its exact share, but for rounding


class Source(NamedTuple):
    """Shards that are gone through pass by pass, on their own, and how often they are drawn from."""

    num_shards: int
    weight: float = 1.0


class Window(NamedTuple):
    """Where reading stands in one source: its shards now and next, and the share of the first that is read."""

    shards: list[int]
    following: list[int]
    share: float


@dataclass(frozen=True, eq=False)
class Mixture:
    """The endless order of several sources whose shards lie one after the other; of a single one, its own order.

    Each block of positions holds every source in the share of its weight, cumulatively rounded, at places that a
    permutation draws. Each sample of a source comes exactly once in each pass over that source.
    """

    seed: int
    orders: tuple[WindowedOrder, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, seed: int, counts: Sequence[int], sources: Sequence[Source], window: int) -> "Mixture":
        """Make the order of shards that hold `counts` samples."""
        ends = np.cumsum([source.num_shards for source in sources]).tolist()
        orders = tuple(
            WindowedOrder(source_seed(seed, number), tuple(counts[end - source.num_shards : end]), window)
            for number, (source, end) in enumerate(zip(sources, ends, strict=True))
        )
        return cls(seed, orders, tuple(source.weight for source in sources))

    def sample_at(self, position: int) -> int:
        """Return the sample, numbered over all shards, at a position."""
        source, place = self.source_at(position)
        return self.first_sample[source] + self.orders[source].sample_at(place)

    def source_at(self, position: int) -> tuple[int, int]:
        """Return the source at a position, and the place in that source's own order."""
        if len(self.orders) == 1:
            return 0, position
        block, place = divmod(position, BLOCK)
        place = permuted(place, BLOCK, round_keys(self.seed, block, BLOCK_KEYS))
        begins, ends = shares_before(self, block), shares_before(self, block + 1)
        source = 0
        while place >= (share := ends[source] - begins[source]):
            place, source = place - share, source + 1
        return source, begins[source] + place

    def substitute_at(self, position: int, attempt: int) -> int:
        """Return the sample of the same source that takes the place of a bad one; attempts count from 0."""
        source, _ = self.source_at(position)
        return self.first_sample[source] + substitute_at(self.seed, self.orders[source].num_samples, position, attempt)

    def windows_at(self, position: int) -> list[Window]:
        """Return where reading stands in each source."""
        begins = [position] if len(self.orders) == 1 else shares_before(self, position // BLOCK)
        return [
            Window([first + shard for shard in shards], [first + shard for shard in following], share)
            for first, order, place in zip(self.first_shard, self.orders, begins, strict=True)
            for shards, following, share in [order.windows_from(place)]
        ]

    def mixing(self, batch_size: int, num_batches: int = 20) -> float:
        """Say how much worse than a full shuffle the source that is mixed worst is (see `order.mixing`)."""
        found = [1.0]
        for order, weight in zip(self.orders, self.weights, strict=True):
            share = max(1, round(batch_size * weight / sum(self.weights)))
            if not order.is_one_window and share < order.num_samples:
                found.append(mixing(order, share, num_batches))
        return max(found)

    @cached_property
    def first_sample(self) -> list[int]:
        return np.cumsum([0, *[order.num_samples for order in self.orders]]).tolist()

    @cached_property
    def first_shard(self) -> list[int]:
        return np.cumsum([0, *[len(order.counts) for order in self.orders[:-1]]]).tolist()

    @cached_property
    def shares(self) -> list[Fraction]:
        """Each source's part of what the sources before it leave: rounded one after the other, none ever goes back."""
        weights = [Fraction(weight) for weight in self.weights]
        return [weight / sum(weights[number:]) for number, weight in enumerate(weights)]


@lru_cache(maxsize=64)
def shares_before(mixture: Mixture, block: int) -> list[int]:
    """Count each source's places before a block."""
    left, counts = block * BLOCK, []
    for share in mixture.shares:
        counts.append(int(left * share + Fraction(1, 2)))
        left -= counts[-1]
    return counts


def source_seed(seed: int, number: int) -> int:
    """Seed the order of a source; the first has the seed of the run, as if it were alone."""
    return seed if number == 0 else int(np.random.SeedSequence([seed, number, SOURCE_SEED]).generate_state(1, "u8")[0])
