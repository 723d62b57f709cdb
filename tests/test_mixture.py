"""Several sources: exact shares in each block, each sample once per pass of its source, all from the position alone."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softmoe_clip.data_pipelines.mixture import BLOCK, Mixture, Source
from softmoe_clip.data_pipelines.order import WindowedOrder, mixing

WEIGHTS = st.floats(1e-3, 1e3)
SOURCES = st.lists(st.tuples(st.lists(st.integers(10, 60), min_size=1, max_size=6), WEIGHTS), min_size=1, max_size=4)


def mixture_of(sources, seed=0, window=2):
    counts = [count for counts, _ in sources for count in counts]
    return Mixture.of(seed, counts, [Source(len(counts), weight) for counts, weight in sources], window)


@settings(deadline=None, max_examples=8)
@given(sources=SOURCES, seed=st.integers(0, 2**32))
def test_each_pass_of_each_source_holds_each_of_its_samples_once(sources, seed):
    mixture, num_positions = mixture_of(sources, seed), BLOCK
    drawn = [[] for _ in sources]
    for position in range(num_positions):
        source, place = mixture.source_at(position)
        drawn[source].append((place, mixture.sample_at(position)))
    first = 0
    for (counts, _), places in zip(sources, drawn, strict=True):
        total = sum(counts)
        in_order = [sample for _, sample in sorted(places)]
        assert sorted(place for place, _ in places) == list(range(len(places))), "no place is left out or met twice"
        for start in range(0, len(places) - total + 1, total):
            assert sorted(in_order[start : start + total]) == list(range(first, first + total))
        first += total


@settings(deadline=None, max_examples=30)
@given(weights=st.lists(WEIGHTS, min_size=1, max_size=6), block=st.integers(0, 10**9))
def test_every_block_holds_every_source_in_its_share(weights, block):
    mixture = mixture_of([([5], weight) for weight in weights])
    found = Counter(mixture.source_at(block * BLOCK + place)[0] for place in range(BLOCK))
    for source, weight in enumerate(weights):
        assert abs(found[source] - BLOCK * weight / sum(weights)) <= len(weights)
        begin = mixture.source_at(block * BLOCK)
        assert begin[1] <= (block + 1) * BLOCK
    far = [0] * len(weights)
    for place in range(BLOCK):
        source, index = mixture.source_at(block * BLOCK + place)
        far[source] = max(far[source], index + 1)
    for source, weight in enumerate(weights):
        if found[source]:  # the rounding does not add up over a billion blocks
            expected = (block + 1) * BLOCK * weight / sum(weights)
            assert far[source] == pytest.approx(expected, abs=len(weights), rel=1e-9)


def test_sources_lie_in_other_places_of_each_block():
    mixture = mixture_of([([5], 1.0), ([5], 3.0)])
    blocks = [tuple(mixture.source_at(block * BLOCK + place)[0] for place in range(BLOCK)) for block in range(3)]
    assert len(set(blocks)) == 3
    runs = max(len(list(run)) for block in blocks for _, run in itertools.groupby(block))
    assert runs < 60, "no source has long stretches of its own"


@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=8), seed=st.integers(0, 99), weight=WEIGHTS)
def test_a_single_source_has_its_own_order_whatever_its_weight(counts, seed, weight):
    mixture, order = mixture_of([(counts, weight)], seed), WindowedOrder(seed, tuple(counts), 2)
    assert [mixture.sample_at(p) for p in range(50)] == [order.sample_at(p) for p in range(50)]


def test_equal_sources_go_through_their_samples_in_other_orders():
    mixture = mixture_of([([30], 1.0), ([30], 1.0)])
    passes = [[], []]
    for position in range(BLOCK):
        source, place = mixture.source_at(position)
        passes[source].append((place, mixture.sample_at(position) % 30))
    first, second = ([sample for _, sample in sorted(places)[:30]] for places in passes)
    assert first != second


@settings(deadline=None, max_examples=50)
@given(sources=SOURCES, position=st.integers(0, 10**12), attempt=st.integers(0, 20))
def test_a_substitute_is_of_the_same_source(sources, position, attempt):
    mixture = mixture_of(sources)
    source, _ = mixture.source_at(position)
    substitute = mixture.substitute_at(position, attempt)
    assert mixture.first_sample[source] <= substitute < mixture.first_sample[source + 1]


def test_each_source_reads_in_windows_of_its_own_shards():
    mixture = mixture_of([([100] * 6, 1.0), ([100] * 7, 1.0)], window=2)
    for block in range(10):
        first, second = mixture.windows_at(block * BLOCK)
        assert set(first.shards + first.following) <= set(range(6))
        assert set(second.shards + second.following) <= set(range(6, 13))


def test_the_mixing_of_several_sources_is_that_of_the_worst():
    alone = mixing(WindowedOrder(0, (500,) * 16, 2), 48, 20)
    assert alone > 2
    assert mixture_of([([500] * 16, 1)]).mixing(48) == alone
    assert mixture_of([([500] * 16, 3), ([8000], 1)]).mixing(64) == alone, "a single shard is mixed as a whole"
    assert mixture_of([([500] * 16, 1)], window=0).mixing(48) == 1
    assert mixture_of([([5] * 3, 1)]).mixing(48) == 1, "a batch that holds more than a pass"
