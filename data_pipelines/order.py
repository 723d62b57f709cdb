"""Which sample stands at which position: a pure function, the same for any number of processes and workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

NUM_ROUNDS = 6
# Tiny sets are permuted inside a larger range, whose halves mix better than a bit or two would.
MIN_BITS = 8
MASK = (1 << 64) - 1
# Draws of different kinds must not share a generator.
PASS_KEYS, SUBSTITUTE, SHARD_ORDER, WINDOW_KEYS, SOURCE_SEED, BLOCK_KEYS = range(1, 7)


def sample_at(seed: int, num_samples: int, position: int) -> int:
    """Return the sample (0 to num_samples - 1) at a position of the endless order of a set that is mixed as a whole.

    Positions p with the same p // num_samples are one pass, in which each sample comes exactly once, in a fresh order.
    """
    number, place = divmod(position, num_samples)
    return permuted(place, num_samples, round_keys(seed, number, PASS_KEYS))


def substitute_at(seed: int, num_samples: int, position: int, attempt: int) -> int:
    """Return the sample that takes the place of a bad one at `position`; attempts count from 0."""
    return int(np.random.default_rng([seed, position, attempt, SUBSTITUTE]).integers(num_samples))


class Pass(NamedTuple):
    """One pass over the shards, in an order of its own that is cut into windows."""

    shards: np.ndarray
    before: np.ndarray  # samples before each of them, and all at the end
    cuts: np.ndarray  # where each window begins among `shards`, and their number at the end
    starts: list[int]  # samples before each window


@dataclass(frozen=True, eq=False)  # told apart by identity: a hash of 10,000 counts would be taken at every position
class WindowedOrder:
    """The endless order of one source, whose shards hold `counts` samples: mixed well, read window by window.

    Each pass puts the shards into a fresh order and cuts it into windows of at most `window` shards (0: of all); in a
    window the samples are permuted. A set with no more shards than a window is mixed as a whole.
    """

    seed: int
    counts: tuple[int, ...]
    window: int = 0

    def sample_at(self, position: int) -> int:
        """Return the sample, numbered in shard order, at a position; no other position is looked at."""
        if self.is_one_window:
            return sample_at(self.seed, self.num_samples, position)
        number, place = divmod(position, self.num_samples)
        this = pass_over(self, number)
        window = int(np.searchsorted(this.starts, place, "right")) - 1
        start, end = this.starts[window], this.starts[window + 1]
        keys = round_keys(self.seed, number, window, WINDOW_KEYS)
        place = start + permuted(place - start, end - start, keys)
        nth = int(np.searchsorted(this.before, place, "right")) - 1
        return self.first[this.shards[nth]] + place - int(this.before[nth])

    def windows_from(self, position: int) -> tuple[list[int], list[int], float]:
        """Return the shards of the window at a position, those of the next one, and the share of the first read."""
        number, place = divmod(position, self.num_samples)
        this = pass_over(self, number)
        window = int(np.searchsorted(this.starts, place, "right")) - 1
        start, end = this.starts[window], this.starts[window + 1]
        last = window + 2 == len(this.cuts)
        following, after = (pass_over(self, number + 1), 0) if last else (this, window + 1)
        return shards_of(this, window), shards_of(following, after), (place - start) / (end - start)

    @cached_property
    def num_samples(self) -> int:
        return sum(self.counts)

    @cached_property
    def first(self) -> list[int]:
        """The number of each shard's first sample."""
        return np.cumsum([0, *self.counts]).tolist()

    @property
    def is_one_window(self) -> bool:
        return not 0 < self.window < len(self.counts)


@lru_cache(maxsize=16)
def pass_over(order: WindowedOrder, number: int) -> Pass:
    """Lay out one pass; its windows differ by one shard at most, so that none is a small rest that mixes badly."""
    num_shards = len(order.counts)
    if order.is_one_window:
        shards, cuts = np.arange(num_shards), np.array([0, num_shards])
    else:
        # Raw bits, whose stream numpy promises to keep; its `permutation` may change with a version.
        bits = np.random.PCG64([order.seed, number, SHARD_ORDER]).random_raw(num_shards)
        shards = np.argsort(bits, kind="stable")
        num_windows = -(-num_shards // order.window)
        cuts = np.arange(num_windows + 1) * num_shards // num_windows
    before = np.cumsum([0, *np.asarray(order.counts)[shards]])
    return Pass(shards, before, cuts, before[cuts].tolist())


def shards_of(layout: Pass, window: int) -> list[int]:
    """Return the shards of one window."""
    return layout.shards[layout.cuts[window] : layout.cuts[window + 1]].tolist()


def mixing(order: WindowedOrder, batch_size: int, num_batches: int = 200) -> float:
    """Say how much worse than a full shuffle an order mixes shards into batches: 1 is as good, 2 twice the variance.

    If something depends on the shard alone, one class in each, its mean over a batch strays from its mean over the set;
    this is the variance of that, over `num_batches` batches of one pass, relative to batches drawn from the whole set.
    """
    shares = np.asarray(order.counts) / order.num_samples
    starts = np.linspace(0, order.num_samples - batch_size, num_batches).astype(int)
    variances = []
    for start in starts.tolist():
        samples = [order.sample_at(position) for position in range(start, start + batch_size)]
        shards = np.searchsorted(order.first, samples, "right") - 1
        variances.append(((np.bincount(shards, minlength=len(shares)) / batch_size - shares) ** 2).sum())
    left_out = (order.num_samples - batch_size) / (order.num_samples - 1)  # a full shuffle draws without replacement
    return float(np.mean(variances) / ((1 - (shares**2).sum()) / batch_size * left_out))


def permuted(place: int, size: int, keys: Sequence[int]) -> int:
    """Permute the numbers below `size`: a Feistel network, walked until it falls inside.

    Any place in microseconds and no memory, however large the size (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains").
    """
    half_bits = max(MIN_BITS, (size - 1).bit_length() + 1) // 2
    place = network(place, half_bits, keys)
    while place >= size:
        place = network(place, half_bits, keys)
    return place


@lru_cache(maxsize=64)
def round_keys(*drawn_from: int) -> tuple[int, ...]:
    """Draw the keys of a network."""
    return tuple(np.random.SeedSequence(drawn_from).generate_state(NUM_ROUNDS, np.uint64).tolist())


def network(value: int, half_bits: int, keys: Sequence[int]) -> int:
    """Permute the numbers below 4**half_bits: each round mixes one half into the other, which can be undone."""
    low_half = (1 << half_bits) - 1
    left, right = value >> half_bits, value & low_half
    for key in keys:
        left, right = right, left ^ (mixed(right ^ key) & low_half)
    return left << half_bits | right


def mixed(value: int) -> int:
    """Scatter 64 bits (the finaliser of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)
