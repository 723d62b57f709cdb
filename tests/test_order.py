"""The global order: a permutation per pass, a pure function of seed and position."""

import itertools
import time

import numpy as np
import pytest

from softmoe_clip.data_pipelines.order import sample_at, substitute_at


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
