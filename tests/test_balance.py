"""Balanced assignment: against all there are, against scipy's solver, and where everything is equal."""

import numpy as np
import pytest
import torch
from assignment_oracle import best_of_all, by_scipy

from softmoe_clip.moe.balance import balanced_experts


def total(scores, assigned):
    return scores.double().gather(2, torch.as_tensor(np.asarray(assigned))[..., None]).sum((1, 2))


def drawn(kind, g, m, e):
    """Scores as of a fresh gate; with favourites of all; along few directions; of few different values."""
    generator = torch.Generator().manual_seed(m * e)
    scores = torch.randn(g, m, e, generator=generator)
    if kind == "favourites":
        return scores + 5 * torch.randn(e, generator=generator)
    if kind == "few directions":
        return torch.randn(g, m, 2, generator=generator) @ torch.randn(2, e, generator=generator)
    return scores.round() if kind == "ties" else scores


KINDS = ("fresh", "favourites", "few directions", "ties")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "e"), [(6, 3), (7, 3), (2, 3), (5, 1), (6, 2)])
def test_small_assignments_are_the_best_of_all(kind, m, e):
    scores = drawn(kind, 4, m, e)
    found, expected = balanced_experts(scores), [best_of_all(group) for group in scores.double().numpy()]
    torch.testing.assert_close(total(scores, found), total(scores, expected), rtol=0, atol=1e-8)
    if kind in ("fresh", "favourites"):  # there the best one is the only one
        assert found.tolist() == [list(assigned) for assigned in expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "e"), [(65, 14), (48, 16), (197, 32), (12, 40)])
def test_assignments_are_as_good_as_scipys_and_loads_differ_by_one_at_most(kind, m, e):
    scores = drawn(kind, 3, m, e)
    found = balanced_experts(scores)
    expected = [by_scipy(group) for group in scores.double().numpy()]
    torch.testing.assert_close(total(scores, found), total(scores, expected), rtol=0, atol=1e-6)
    for group in found:
        loads = torch.bincount(group, minlength=e)
        assert len(loads) == e
        assert loads.max() - loads.min() == (m % e > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_assigned_as_it_is_alone_and_always_in_the_same_way(kind):
    scores = drawn(kind, 5, 30, 7)
    together = balanced_experts(scores)
    assert torch.equal(balanced_experts(scores), together)
    assert torch.equal(torch.cat([balanced_experts(group[None]) for group in scores]), together)


def test_what_is_equal_for_all_experts_does_not_matter():
    scores = drawn("fresh", 2, 12, 5)
    assert torch.equal(balanced_experts(scores), balanced_experts(scores + 8 * torch.arange(12)[:, None]))


def test_equal_scores_equal_tokens_and_what_is_no_number_come_to_an_end_in_balance():
    for scores in (
        torch.zeros(1, 12, 4),
        torch.randn(4).expand(1, 12, 4),
        torch.full((1, 12, 4), torch.nan),
        torch.full((1, 12, 4), -torch.inf),
        torch.randn(1, 12, 4).masked_fill(torch.rand(1, 12, 4) < 0.2, torch.inf),
        1e38 * torch.randn(1, 12, 4),
        1e-40 * torch.randn(1, 12, 4),
    ):
        assert torch.bincount(balanced_experts(scores)[0]).tolist() == [3, 3, 3, 3]


def test_graphs_and_the_meta_device_see_one_operator():
    torch.library.opcheck(balanced_experts, (drawn("fresh", 2, 9, 4),), test_utils=("test_schema", "test_faketensor"))
    assert balanced_experts(torch.empty(2, 9, 4, device="meta")).shape == (2, 9)
