"""Contrastive losses: open_clip's values and gradients, a loop over all pairs, and one process equal to two."""

import multiprocessing

import open_clip
import pytest
import torch
from loss_oracle import (
    CASES,
    COUNT_AS,
    LOOPS,
    NUM_PAIRS,
    alike,
    draws,
    duplicates,
    one_of_several,
    value_and_gradients,
)
from open_clip.loss import SigLipLoss

from softmoe_clip.training import losses
from softmoe_clip.training.duplicates import Duplicates
from softmoe_clip.training.losses import LOSSES, clip_loss, siglip_loss


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_equals_a_loop_over_all_pairs(name):
    inputs = [t.detach() for t in draws()]
    assert LOSSES[name](*inputs).item() == pytest.approx(float(LOOPS[name](*inputs)), rel=1e-12)


def test_the_clip_loss_is_open_clips():
    *inputs, _ = draws()
    assert_same(value_and_gradients(clip_loss, *inputs), value_and_gradients(open_clip.ClipLoss(), *inputs))


def test_the_siglip_loss_is_open_clips():
    inputs = draws()
    assert_same(value_and_gradients(siglip_loss, *inputs), value_and_gradients(SigLipLoss(), *inputs))


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    for gradient, expected in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_a_bias_changes_nothing_in_the_softmax_loss():
    image, text, scale, bias = draws()
    with_bias, gradients = value_and_gradients(clip_loss, image, text, scale, bias)
    assert with_bias.item() == pytest.approx(clip_loss(image, text, scale).item(), rel=1e-12)
    assert gradients[-1].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_that_match_lose_less_than_pairs_that_do_not(name):
    image, _, scale, bias = draws()
    assert LOSSES[name](image, image, scale, bias) < LOSSES[name](image, image.roll(1, 0), scale, bias)


@pytest.mark.parametrize("count_as", COUNT_AS)
@pytest.mark.parametrize("name", LOSSES)
def test_duplicates_count_as_a_loop_over_all_pairs_says(name, count_as):
    inputs = [t.detach() for t in draws()]
    found = LOSSES[name](*inputs, duplicates=duplicates(count_as)).item()
    assert found == pytest.approx(LOOPS[name](*inputs, count_as), rel=1e-12)


def test_pairs_that_are_all_different_lose_the_same_however_duplicates_count():
    different = torch.arange(NUM_PAIRS)
    for name, loss in LOSSES.items():
        for count_as in ("positives", "masked"):
            found = value_and_gradients(loss, *draws(), duplicates=Duplicates(count_as, different, different))
            assert_same(found, value_and_gradients(LOSSES[name], *draws()))


def both(self, first, num_rows):
    rows = slice(first, first + num_rows)
    return (self.caption_ids[rows, None] == self.caption_ids) & (self.picture_ids[rows, None] == self.picture_ids)


def captions_alone(self, first, num_rows):
    return self.caption_ids[first : first + num_rows, None] == self.caption_ids


def first_rows(self, first, num_rows):
    return alike_rows(self, 0, num_rows)


def shared_by_column(logits, targets):
    if targets.is_floating_point():
        targets = (targets > 0).to(logits) / (targets > 0).sum(0)
        return -(targets * logits.log_softmax(1)).sum(1).mean()
    return cross_entropy(logits, targets)


alike_rows, cross_entropy = Duplicates.alike, losses.F.cross_entropy
ALL, POSITIVES = ("positives", "masked"), ("positives",)
MUTANTS = {
    "both caption and picture": (ALL, Duplicates, "alike", both),
    "captions alone": (ALL, Duplicates, "alike", captions_alone),
    "each chunk's rows are the first": (ALL, Duplicates, "alike", first_rows),
    "targets on the wrong axis": (POSITIVES, losses.F, "cross_entropy", shared_by_column),
    "nothing": ((), losses.F, "cross_entropy", cross_entropy),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_loops_over_all_pairs_catch_mutants(mutant, monkeypatch):
    assert alike(1, 3) == alike(1, 4) != alike(3, 4)  # else sums over rows and columns would be the same
    caught, *change = MUTANTS[mutant]
    monkeypatch.setattr(*change)
    for count_as in ALL:
        inputs = [t.detach() for t in draws()]
        found = clip_loss(*inputs, duplicates=duplicates(count_as), chunk_size=4).item()
        assert (found != pytest.approx(LOOPS["clip"](*inputs, count_as), rel=1e-6)) == (count_as in caught)


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_computes(tmp_path, num_processes):
    ranks = in_processes(num_processes, tmp_path)
    for rank, found in enumerate(ranks):
        assert found["gathered"] == [float(number) for number in range(num_processes)]
        if num_processes == 2:
            assert_alone_is_a_part(found, rank, NUM_PAIRS // 2)
    for name, count_as, chunk_size in CASES:
        expected = value_and_gradients(LOSSES[name], *draws(), duplicates=duplicates(count_as))
        found = [rank[f"{name} {count_as} {chunk_size}"] for rank in ranks]
        collectives = found[0]["calls"]
        assert collectives.count("all_reduce") == {"clip": 2, "siglip": 1}[name]
        # DDP averages over processes what each of them computes for the parameters; so does this for the features.
        features = [torch.cat([f["gradients"][i] for f in found]) / num_processes for i in range(2)]
        scalars = [sum(f["gradients"][i] for f in found) / num_processes for i in (2, 3)]
        for f in found:
            assert f["calls"] == collectives
            assert_same((f["value"], features + scalars), (expected[0].detach(), expected[1]))


def in_processes(num_processes, folder):
    """Compute every case in several processes; imports are paid once, by the server that they are forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loss_oracle"])
    arguments = [(rank, num_processes, str(folder)) for rank in range(num_processes)]
    processes = [context.Process(target=one_of_several, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_processes)]


def assert_alone_is_a_part(found, rank, size):
    part = slice(rank * size, (rank + 1) * size)
    image, text, *scalars = (t.detach() for t in draws())
    for name, count_as, chunk_size in CASES:
        if count_as == "negatives":
            expected = LOOPS[name](image[part], text[part], *scalars)
            assert found[f"{name} {count_as} {chunk_size}"]["alone"] == pytest.approx(float(expected), rel=1e-12)
