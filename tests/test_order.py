"""The global order: a permutation per pass, a pure function of seed and position."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softmoe_clip.data_pipelines.order import WindowedOrder, mixing, sample_at, substitute_at


@pytest.mark.parametrize("num_samples", [1, 2, 3, 16, 17, 255, 256, 257, 1000, 1025])
def test_each_pass_holds_each_sample_once(num_samples):
    for number in range(3):
        order = [sample_at(7, num_samples, number * num_samples + place) for place in range(num_samples)]
        assert sorted(order) == list(range(num_samples))


def test_passes_and_seeds_differ():
    orders = {(s, p): tuple(sample_at(s, 100, p * 100 + i) for i in range(100)) for s in range(5) for p in range(5)}
    assert len(set(orders.values())) == 25


def test_every_arrangement_of_a_tiny_set_is_about_as_likely():
    counts = dict.fromkeys(itertools.permutations(range(3)), 0)
    for seed in range(1200):
        counts[tuple(sample_at(seed, 3, place) for place in range(3))] += 1
    # 200 expected each, standard deviation 13.
    assert all(140 < count < 260 for count in counts.values()), counts


def test_samples_are_spread_over_places_evenly_and_independently():
    num_samples, passes = 1000, 200
    order = np.array([[sample_at(0, num_samples, p * num_samples + i) for i in range(50)] for p in range(passes)])
    deciles = np.bincount(order.ravel() // 100, minlength=10)
    assert (np.abs(deciles - passes * 5) < 5 * np.sqrt(passes * 5)).all()
    neighbours = np.corrcoef(order[:, :-1].ravel(), order[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.05
    assert np.mean(np.diff(order, axis=1) == 1) < 0.01, "neighbours on disk are not neighbours in the order"


def test_billions_of_samples_need_no_memory_and_no_time():
    start = time.perf_counter()
    samples = {sample_at(0, 5_000_000_000, 10**15 + place) for place in range(1000)}
    assert time.perf_counter() - start < 0.5
    assert len(samples) == 1000


def test_substitutes_are_drawn_from_seed_position_and_attempt():
    draws = [substitute_at(0, 1000, position, attempt) for position in range(20) for attempt in range(20)]
    assert draws == [substitute_at(0, 1000, position, attempt) for position in range(20) for attempt in range(20)]
    assert len(set(draws)) > 300
    assert 0 <= min(draws) <= max(draws) < 1000


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any)


@settings(deadline=None, max_examples=50)
@given(counts=COUNTS, window=st.integers(0, 12), seed=st.integers(0, 2**64))
def test_each_pass_of_windows_holds_each_sample_once_and_each_window_few_shards(counts, window, seed):
    order, total = WindowedOrder(seed, tuple(counts), window), sum(counts)
    places = {total * number + place for number in range(2) for place in range(total)}
    samples = {position: order.sample_at(position) for position in sorted(places, key=lambda p: p * 7919 % 1009)}
    for number in range(2):
        one_pass = [samples[total * number + place] for place in range(total)]
        assert sorted(one_pass) == list(range(total))
        found = [order.windows_from(total * number + place) for place in range(total)]
        for sample, (current, _, share) in zip(one_pass, found, strict=True):
            assert np.searchsorted(order.first, sample, "right") - 1 in current
            assert len(current) <= (window or len(counts))
            assert 0 <= share < 1
        windows = [current for current, _ in itertools.groupby(current for current, _, _ in found)]
        met = [shard for window in windows for shard in window]
        assert len(set(met)) == len(met), "no shard is met in two windows"


@settings(max_examples=30, deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 1000), extra=st.integers(0, 3))
def test_no_more_shards_than_a_window_are_mixed_as_before_there_were_windows(counts, seed, extra):
    for window in (0, len(counts) + extra):
        order = WindowedOrder(seed, tuple(counts), window)
        positions = range(0, 3 * sum(counts), 5)
        assert [order.sample_at(p) for p in positions] == [sample_at(seed, sum(counts), p) for p in positions]


def test_the_next_window_is_known_before_it_comes():
    order = WindowedOrder(3, (5,) * 10, 3)
    found = [order.windows_from(position) for position in range(150)]
    for (current, following, share), (later, _, later_share) in itertools.pairwise(found):
        assert (later, later_share > share) == (current, True) or (later, later_share) == (following, 0)


def test_passes_and_seeds_put_other_shards_together():
    def windows(seed, number):
        order = WindowedOrder(seed, (10,) * 12, 4)
        return tuple(tuple(order.windows_from(120 * number + place)[0]) for place in range(0, 120, 40))

    found = {windows(seed, number) for seed in range(3) for number in range(3)}
    assert len(found) == 9
    assert all(sorted(shard for window in windows for shard in window) == list(range(12)) for windows in found)


def test_any_position_of_a_billion_samples_in_ten_thousand_shards_is_found_at_once():
    order = WindowedOrder(0, (100_000,) * 10_000, 32)
    start = time.perf_counter()
    samples = {order.sample_at(10**17 + place) for place in range(1000)}
    assert time.perf_counter() - start < 0.5
    assert len(samples) == 1000
    assert len({sample // 100_000 for sample in samples}) in (31, 32)


def test_the_mixing_of_windows_is_as_good_as_theirs_can_be():
    """A batch of b from w of n equal shards strays with (1/w - 1/n) + (1 - 1/w) / b of one shard's variance."""
    batch_size, num_shards = 64, 64
    for window in (1, 8, 32, 0):
        order = WindowedOrder(1, (2000,) * num_shards, window)
        per_window = window or num_shards
        strays = 1 / per_window - 1 / num_shards + (1 - 1 / per_window) / batch_size
        expected = strays / ((1 - 1 / num_shards) / batch_size)
        assert mixing(order, batch_size) == pytest.approx(expected, rel=0.15)
