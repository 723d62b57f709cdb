"""Contrastive losses: open_clip's values and gradients, a loop over all pairs, and one process equal to two."""

import math

import open_clip
import pytest
import torch
import torch.distributed as dist
from open_clip.loss import SigLipLoss
from torch import nn

from softmoe_clip.training.distributed import alone, any_process, gather_with_grad, over_processes
from softmoe_clip.training.losses import LOSSES, clip_loss, siglip_loss

NUM_PAIRS, WIDTH = 6, 5


def draws(dtype=torch.float64):
    """Unit vectors of pictures and texts, a scale and a bias, all of which want a gradient."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        nn.functional.normalize(torch.randn(NUM_PAIRS, WIDTH, generator=generator, dtype=dtype), dim=-1)
        for _ in range(2)
    )
    return [t.requires_grad_() for t in (image, text, torch.tensor(7.0, dtype=dtype), torch.tensor(-3.0, dtype=dtype))]


def value_and_gradients(loss, *inputs):
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs, allow_unused=True)
    return value, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True)]


def clip_by_a_loop(image, text, scale, bias):
    scores = [[scale * (a * b).sum() for b in text] for a in image]
    total = 0
    for i in range(len(image)):
        row = sum(math.exp(scores[i][j]) for j in range(len(text)))
        column = sum(math.exp(scores[j][i]) for j in range(len(image)))
        total += math.log(row) - scores[i][i] + math.log(column) - scores[i][i]
    return total / (2 * len(image))


def siglip_by_a_loop(image, text, scale, bias):
    total = 0
    for i, a in enumerate(image):
        for j, b in enumerate(text):
            score = scale * (a * b).sum() + bias
            total += math.log1p(math.exp(-score if i == j else score))
    return total / len(image)


LOOPS = {"clip": clip_by_a_loop, "siglip": siglip_by_a_loop}


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


def test_two_processes_compute_what_one_computes(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    for name in LOSSES:
        value, gradients = value_and_gradients(LOSSES[name], *draws())
        ranks = [torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2)]
        for found in ranks:
            torch.testing.assert_close(found["value"], value.detach(), rtol=1e-12, atol=0)
            assert found["gathered"] == [0.0, 1.0]
            assert found["any"] == [False, True]
            assert found["alone"] == pytest.approx(float(found["half"]), rel=1e-12)
        # DDP averages over processes what each of them computes for the parameters; so does this for the features.
        features = [torch.cat([r["gradients"][i] for r in ranks]) / 2 for i in range(2)]
        scalars = [sum(r["gradients"][i] for r in ranks) / 2 for i in (2, 3)]
        for found, expected in zip(features + scalars, gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def one_of_two(rank, folder):
    """Compute both losses on half of the pairs, in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        assert dist.get_world_size() == 2
        for name, loss in LOSSES.items():
            image, text, scale, bias = draws()
            half = slice(rank * NUM_PAIRS // 2, (rank + 1) * NUM_PAIRS // 2)
            inputs = [image[half].detach().requires_grad_(), text[half].detach().requires_grad_(), scale, bias]
            value, gradients = value_and_gradients(loss, *inputs)
            with alone():
                by_itself = loss(*inputs).item()
            found = {
                "value": over_processes(value, "mean"),
                "gradients": gradients,
                "gathered": gather_with_grad(torch.tensor([float(rank)])).tolist(),
                "any": [any_process(False, value.device), any_process(rank == 1, value.device)],
                "alone": by_itself,
                "half": float(LOOPS[name](*(t.detach() for t in inputs))),
            }
            torch.save(found, f"{folder}/{name}{rank}.pt")
    finally:
        dist.destroy_process_group()
