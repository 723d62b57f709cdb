"""Tell pictures that look nearly the same: 256 bits of the shapes in each, 16 patches of its colours, and a search."""

from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 32  # pixels of the small grey picture; its lowest frequencies, 16 across and down, give a bit each
NUM_FREQUENCIES = 16
NUM_COARSE = 8  # the lowest 8 across and down are searched, all 256 bits decide
HASH_BYTES = NUM_FREQUENCIES**2 // 8
COARSE_BYTES = NUM_COARSE**2 // 8
PATCHES = 4
COLOUR_BYTES = PATCHES**2 * 3
MIN_SIDE = 2 * SIDE  # decode a picture no smaller than this
FLAT = 4  # a picture whose 32 x 32 greys differ by less has no shapes
# Chosen on the 7,500 photographs of Flickr8k. Two different ones differ in 127 bits, with a standard deviation of 8; of
# their 28 million pairs one differs in less than 64, and that one is a doubled picture. Copies that were recompressed
# (quality 30), halved or enlarged 1.7 times differ in 24 bits at most, those that lost 3 % of width and height in 44 at
# most, 5 % in 40 at the median. Products on white, the hardest photographs, begin to look alike at 56.
MAX_BITS = 48
MAX_COARSE_BITS = 10
# Tells flags and icons apart that have one shape and other colours, and lets a copy be brighter or warmer as a whole:
# the patches may differ by a median, and each of them by so much more, out of 255.
MAX_SHIFT = 40
MAX_PATCH = 25
QUERIES = 64  # searched at a time: few, since a hundred thousand slides of one lecture look all alike
PATIENCE, MANY = 8, 10_000  # hits of other colours are looked at one by one, then all the rest, so many at a time
FEW = 10_000  # are compared one by one, more through tables

FREQUENCIES = np.arange(NUM_FREQUENCIES)[:, None]
WAVES = np.cos(np.pi / SIDE * FREQUENCIES * (np.arange(SIDE) + 0.5))


class Look(NamedTuple):
    """What is kept of n pictures: shapes (n, 32) and colours (n, 48), both uint8; no shapes for a flat picture."""

    shapes: np.ndarray
    colours: np.ndarray
    has_shapes: np.ndarray


def look_of(picture: Image.Image) -> tuple[bytes, bytes]:
    """Return the shapes and the colours of an RGB picture; the shapes are b"" where it is of one tone."""
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    colours = np.asarray(picture.resize((PATCHES, PATCHES), Image.Resampling.BOX)).tobytes()
    if np.ptp(grey) < FLAT:
        return b"", colours
    amplitudes = WAVES @ grey @ WAVES.T
    # Photographs have as many positive amplitudes as negative ones; the margin keeps what is 0 in a drawing at 0.
    bits = amplitudes > 1
    coarse = bits[:NUM_COARSE, :NUM_COARSE].ravel()
    fine = np.concatenate([bits[:NUM_COARSE, NUM_COARSE:].ravel(), bits[NUM_COARSE:].ravel()])
    return np.packbits(np.concatenate([coarse, fine])).tobytes(), colours


def nearest_earlier(look: Look) -> list[tuple[int, int, int]]:
    """Find, for each picture that nearly equals earlier ones, the closest: (picture, earlier one, bits that differ)."""
    return _nearest(look, look, earlier=True)


def nearest_in(other: Look, look: Look) -> list[tuple[int, int, int]]:
    """Find, for each picture that nearly equals some of another set, the closest: (picture, the other, bits)."""
    return _nearest(other, look, earlier=False)


def _nearest(base: Look, queries: Look, earlier: bool) -> list[tuple[int, int, int]]:
    rows, asked = base.has_shapes.nonzero()[0], queries.has_shapes.nonzero()[0]
    if not len(rows) or not len(asked):
        return []
    index = _index(base.shapes[rows])
    found = []
    for start in range(0, len(asked), QUERIES):
        block = asked[start : start + QUERIES]
        limits, _, hits = index.range_search(_coarse(queries.shapes[block]), MAX_COARSE_BITS + 1)
        query = np.repeat(block, np.diff(limits.astype(np.int64)))
        hit = rows[hits]
        if earlier:
            query, hit = query[hit < query], hit[hit < query]
        found.extend(_closest(base, queries, query, hit))
    return found


def _index(shapes: np.ndarray):
    """Index the coarse bits: 3 tables of 21 bits, looked up with up to 2 bits flipped, so that no scan is needed."""
    import faiss

    num_bits = 8 * COARSE_BYTES
    if len(shapes) <= FEW:
        index = faiss.IndexBinaryFlat(num_bits)
    else:
        index = faiss.IndexBinaryMultiHash(num_bits, 3, num_bits // 3)
        index.nflip = 2
    index.add(_coarse(shapes))
    return index


def _coarse(shapes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(shapes[:, :COARSE_BYTES])


def _closest(base: Look, queries: Look, query: np.ndarray, hit: np.ndarray) -> list[tuple[int, int, int]]:
    """Choose for each query, whose hits stand together, the hit of its colours with the fewest bits, then the first."""
    bits = np.bitwise_count(queries.shapes[query].view(np.uint64) ^ base.shapes[hit].view(np.uint64)).sum(1)
    near = bits <= MAX_BITS
    query, rank = query[near], bits[near].astype(np.int64) << 32 | hit[near]
    found, rounds = [], 0
    while len(query):
        rounds += 1
        if rounds == PATIENCE:
            kept = [
                same_colours(queries.colours[query[k : k + MANY]], base.colours[rank[k : k + MANY] & 0xFFFFFFFF])
                for k in range(0, len(query), MANY)
            ]
            query, rank = query[np.concatenate(kept)], rank[np.concatenate(kept)]
            continue
        starts = np.flatnonzero(np.diff(query, prepend=-1))
        asked, best = query[starts], np.minimum.reduceat(rank, starts)
        hits = best & 0xFFFFFFFF
        alike = same_colours(queries.colours[asked], base.colours[hits])
        found += zip(asked[alike].tolist(), hits[alike].tolist(), (best[alike] >> 32).tolist(), strict=True)
        # The others ask for their next best.
        lengths = np.diff(starts, append=len(query))
        left = np.repeat(~alike, lengths) & (rank != np.repeat(best, lengths))
        query, rank = query[left], rank[left]
    return sorted(found)


def same_colours(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Tell which of n pairs of colours (n, 48) are those of one picture, up to its exposure and tint."""
    difference = (one.astype(np.float32) - other).reshape(-1, PATCHES**2, 3)
    shift = np.median(difference, axis=1, keepdims=True)
    odd_patch = np.abs(difference - shift).mean(2).max(1)
    return (odd_patch <= MAX_PATCH) & (np.abs(shift).mean((1, 2)) <= MAX_SHIFT)
