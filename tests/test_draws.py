"""Counter-based draws: splitmix64's bits, the right rates, nothing shared between positions, modules and elements."""

import pytest
import torch

from softmoe_clip.training import draws
from softmoe_clip.training.draws import bits, drawing, keep_mask, module_key, normal, row_keys, uniform

CPU = torch.device("cpu")
WORD = 2**64


def splitmix64(state):
    """The published generator's output function, in Python's whole numbers."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % WORD
    return state ^ (state >> 31)


def test_bits_are_splitmix64_over_seed_position_module_and_element():
    golden, key = 0x9E3779B97F4A7C15, module_key("visual.patch_dropout")
    with drawing(3, [0, 7, 2**40], CPU):
        drawn = bits(key, 5)
    for row, position in zip(drawn.tolist(), (0, 7, 2**40), strict=True):
        start = splitmix64(splitmix64((position * golden + splitmix64(4)) % WORD) ^ key % WORD)
        assert [bit % WORD for bit in row] == [splitmix64((start + (i + 1) * golden) % WORD) for i in range(5)]


def test_splitmix64_gives_its_published_numbers():
    found = draws.mixed(torch.arange(1, 4) * draws.GOLDEN)  # the first outputs for the seed 0
    assert [number % WORD for number in found.tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_each_place_has_its_own_numbers_and_the_same_in_any_batch():
    def draw(seed, positions, name):
        with drawing(seed, positions, CPU):
            return bits(module_key(name), 6)

    whole = draw(0, [0, 1, 2, 3], "a")
    assert torch.equal(whole[2:3], draw(0, [2], "a"))
    assert torch.equal(whole[1:], draw(0, [1, 2, 3], "a"))
    others = [whole, draw(1, [0, 1, 2, 3], "a"), draw(0, [4, 5, 6, 7], "a"), draw(0, [0, 1, 2, 3], "b")]
    assert len(torch.stack(others).unique()) == 4 * 4 * 6


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_and_independently(rate):
    steps = round(rate * draws.LANE_STEPS)
    with drawing(0, range(64), CPU):
        masks = torch.stack([~keep_mask(module_key(name), torch.Size((64, 999)), steps) for name in "abcd"]).double()
    p = steps / draws.LANE_STEPS

    def deviations(counts, number):
        """How many standard deviations binomial counts are off, squared and averaged: 1 where they are independent."""
        return ((counts - number * p).square() / (number * p * (1 - p))).mean().item()

    assert abs(masks.mean() - p) < 4.5 * (p * (1 - p) / masks.numel()) ** 0.5
    assert deviations(masks.sum(2), 999) == pytest.approx(1, abs=0.45)  # 256 rows: 0.45 is 5 deviations
    assert deviations(masks.sum(1), 64) == pytest.approx(1, abs=0.6 if rate == 0.001 else 0.15)
    centred = (masks - p) / (p * (1 - p)) ** 0.5
    for left, right in (
        (centred[:, :-1], centred[:, 1:]),  # neighbouring positions
        (centred[:-1], centred[1:]),  # modules
        (centred[..., :-1], centred[..., 1:]),  # elements, which may share a word
        (centred[..., :-4], centred[..., 4:]),
    ):
        products = left * right
        assert abs(products.mean()) < 5 / products.numel() ** 0.5


def test_uniform_and_normal_numbers_have_their_distributions():
    with drawing(0, range(100), CPU):
        flat, bell = uniform(1, torch.Size((100, 1000))), normal(2, torch.Size((100, 1000)))
    observed = torch.histc(flat, bins=50, min=0, max=1)
    chi_square = ((observed - 2000).square() / 2000).sum()
    assert 20 < chi_square < 95  # 49 degrees of freedom
    assert abs(bell.mean()) < 5 / 100_000**0.5
    assert bell.square().mean() == pytest.approx(1, abs=0.025)
    assert bell.pow(4).mean() == pytest.approx(3, abs=0.2)
    assert bell.isfinite().all()


def test_rows_that_do_not_fit_the_positions_are_refused():
    with drawing(0, range(4), CPU):
        assert uniform(0, torch.Size((8, 3))).shape == (8, 3)  # windows of a picture
        assert uniform(0, torch.Size((2, 6))).shape == (2, 6)  # groups of pictures
        with pytest.raises(ValueError, match="got 6 rows for a batch of 4 pairs"):
            uniform(0, torch.Size((6, 3)))
    with pytest.raises(AssertionError, match="sets the positions"):
        uniform(0, torch.Size((4,)))


def test_the_largest_seed_is_a_seed_as_any_other():
    keys = [row_keys(seed, [0, 1]) for seed in (0, 2**63 - 2, 2**63 - 1)]
    assert len({key for pair in keys for key in pair.tolist()}) == 6
