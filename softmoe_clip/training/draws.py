"""Random numbers that depend on (seed, position, module, element) alone: no split, chunk or resume changes them."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014) in int64, whose products wrap: the same bits on every device.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
ROUNDS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))
LAST_SHIFT = 31
LANES = 4  # a keep mask takes 16 of the 64 bits for an element: a quarter of the work
LANE_STEPS = 2**16

_rows: Tensor | None = None


@contextmanager
def drawing(seed: int, positions: Sequence[int], device: torch.device) -> Iterator[None]:
    """Say which positions the rows of a batch have, around its forward and backward pass.

    Backward too, since gradient checkpointing computes the forward pass there again. A plain global, which autograd's
    own threads see as well.
    """
    global _rows
    before, _rows = _rows, row_keys(seed, positions).to(device, non_blocking=True)
    try:
        yield
    finally:
        _rows = before


def row_keys(seed: int, positions: Sequence[int]) -> Int64[Tensor, " b"]:
    """Hash (seed, position) for each row."""
    after_seed = (seed + 1 + 2**63) % 2**64 - 2**63  # as integers of 64 bits count on
    return mixed(torch.tensor(positions) * GOLDEN + mixed(torch.tensor([after_seed])))


def module_key(name: str) -> int:
    """Hash a module's name to a signed 64-bit number."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def mixed(state: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Scramble each number, one to one; every bit of the result depends on every bit given."""
    for shift, factor in ROUNDS:
        state = (state ^ shifted(state, shift)) * factor
    return state ^ shifted(state, LAST_SHIFT)


def shifted(state: Int64[Tensor, "*shape"], shift: int) -> Int64[Tensor, "*shape"]:
    """Shift right, filling with zeros: int64's own shift would copy the sign."""
    return (state >> shift) & (2 ** (64 - shift) - 1)


def num_positions(num_rows: int) -> int:
    """Count the positions of the batch, for so many rows: several for each, as windows are, or groups of several."""
    assert _rows is not None, "a training step sets the positions that random masks are drawn for"
    if num_rows % len(_rows) and len(_rows) % num_rows:
        raise ValueError(f"a module that draws by position got {num_rows} rows for a batch of {len(_rows)} pairs")
    return len(_rows)


def bits(key: int, per_position: int) -> Int64[Tensor, "b per_position"]:
    """Draw 64 bits for each element of each position."""
    counter = torch.arange(1, per_position + 1, device=_rows.device) * GOLDEN
    return mixed(mixed(_rows ^ key)[:, None] + counter)


def keep_mask(key: int, shape: torch.Size, drop_steps: int) -> Bool[Tensor, "rows ..."]:
    """Draw for each element whether it stays; it is dropped with probability drop_steps / LANE_STEPS."""
    per_position = shape.numel() // num_positions(shape[0])
    lanes = bits(key, -(-per_position // LANES)).view(torch.int16)[:, :per_position]  # signed, from -LANE_STEPS / 2
    return (lanes >= drop_steps - LANE_STEPS // 2).reshape(shape)


def uniform(key: int, shape: torch.Size) -> Float[Tensor, "rows ..."]:
    """Draw float64 numbers between 0 and 1, neither of them included."""
    drawn = bits(key, shape.numel() // num_positions(shape[0]))
    return ((shifted(drawn, 11).double() + 0.5) * 2.0**-53).reshape(shape)


def normal(key: int, shape: torch.Size) -> Float[Tensor, "rows ..."]:
    """Draw standard normal float64 numbers."""
    return torch.special.ndtri(uniform(key, shape))
