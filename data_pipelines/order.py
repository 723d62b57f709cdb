"""Which sample stands at which position: a pure function, the same for any number of processes and workers."""

from functools import lru_cache

import numpy as np

NUM_ROUNDS = 6
# Tiny sets are permuted inside a larger range, whose halves mix better than a bit or two would.
MIN_BITS = 8
MASK = (1 << 64) - 1
# Draws of different kinds must not share a generator.
PASS_KEYS, SUBSTITUTE = 1, 2


def sample_at(seed: int, num_samples: int, position: int) -> int:
    """Return the sample (0 to num_samples - 1) at a position of the endless global order.

    Positions p with the same p // num_samples are one pass, in which each sample comes exactly once, in a fresh order.
    The permutation is a Feistel network walked until it falls inside the range: any position in microseconds and no
    memory, however many samples there are (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    number, place = divmod(position, num_samples)
    round_keys = pass_keys(seed, number)
    half_bits = max(MIN_BITS, (num_samples - 1).bit_length() + 1) // 2
    sample = permuted(place, half_bits, round_keys)
    while sample >= num_samples:
        sample = permuted(sample, half_bits, round_keys)
    return sample


def substitute_at(seed: int, num_samples: int, position: int, attempt: int) -> int:
    """Return the sample that takes the place of a bad one at `position`; attempts count from 0."""
    return int(np.random.default_rng([seed, position, attempt, SUBSTITUTE]).integers(num_samples))


@lru_cache(maxsize=8)
def pass_keys(seed: int, number: int) -> tuple[int, ...]:
    """Draw the round keys of one pass."""
    return tuple(np.random.SeedSequence([seed, number, PASS_KEYS]).generate_state(NUM_ROUNDS, np.uint64).tolist())


def permuted(value: int, half_bits: int, round_keys: tuple[int, ...]) -> int:
    """Permute the numbers below 4**half_bits: each round mixes one half into the other, which can be undone."""
    low_half = (1 << half_bits) - 1
    left, right = value >> half_bits, value & low_half
    for key in round_keys:
        left, right = right, left ^ (mixed(right ^ key) & low_half)
    return left << half_bits | right


def mixed(value: int) -> int:
    """Scatter 64 bits (the finaliser of splitmix64)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)
