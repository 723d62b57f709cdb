"""Losses in chunks: equal to the plain form and to finite differences, and never a matrix of all logits."""

import multiprocessing
import resource
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from loss_oracle import COUNT_AS, NUM_PAIRS, draws, duplicates, value_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from softmoe_clip.training import loss_chunks
from softmoe_clip.training.loss_chunks import rows_at_once
from softmoe_clip.training.losses import LOSSES


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 7])
@pytest.mark.parametrize("count_as", COUNT_AS)
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_give_the_plain_loss_and_its_gradients(name, count_as, chunk_size):
    plain = value_and_gradients(LOSSES[name], *draws(), duplicates=duplicates(count_as))
    found = value_and_gradients(LOSSES[name], *draws(), duplicates=duplicates(count_as), chunk_size=chunk_size)
    for ours, expected in zip([found[0], *found[1]], [plain[0], *plain[1]], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count_as", COUNT_AS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradients_of_chunks_are_finite_differences(name, count_as):
    def loss(*inputs):
        return LOSSES[name](*inputs, duplicates=duplicates(count_as), chunk_size=3) * 1.7

    assert torch.autograd.gradcheck(loss, draws())


def test_second_derivatives_of_chunks_are_refused():
    image, text, scale, bias = draws()
    loss = LOSSES["clip"](image, text, scale, bias, chunk_size=3)
    with pytest.raises(RuntimeError, match="a loss computed in chunks has no second derivatives"):
        torch.autograd.grad(loss, image, create_graph=True)


@pytest.mark.parametrize("name", LOSSES)
def test_a_frozen_tower_and_no_gradient_at_all_change_nothing_else(name):
    image, text, scale, bias = draws()
    plain, gradients = value_and_gradients(LOSSES[name], image, text, scale, bias)
    image = image.detach()
    value = LOSSES[name](image, text, scale, bias, chunk_size=3)
    torch.testing.assert_close(torch.autograd.grad(value, text)[0], gradients[1], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert LOSSES[name](image, text, scale, bias, chunk_size=3).item() == pytest.approx(plain.item(), rel=1e-12)
    nothing = LOSSES[name](*(t.detach() for t in draws()), chunk_size=3)
    assert not nothing.requires_grad
    assert nothing.item() == pytest.approx(plain.item(), rel=1e-12)


def test_the_softmax_loss_needs_no_bias_in_chunks_either():
    image, text, scale, _ = draws()
    plain = value_and_gradients(LOSSES["clip"], image, text, scale)
    found = value_and_gradients(LOSSES["clip"], image, text, scale, chunk_size=3)
    torch.testing.assert_close([found[0], *found[1]], [plain[0], *plain[1]], rtol=1e-12, atol=1e-12)


def test_a_chunk_holds_as_many_rows_as_are_asked_for_and_no_more_logits_than_the_limit():
    assert rows_at_once(100, 100, None) == 100
    assert rows_at_once(100, 100, 30) == 30
    assert rows_at_once(100, 100, 300) == 100
    assert rows_at_once(4_096, 4_096, None) == 4_096
    assert rows_at_once(4_097, 4_097, None) == 255
    assert rows_at_once(32_768, 32_768, None) == 32
    assert rows_at_once(32_768, 32_768, 100) == 32
    assert rows_at_once(1_024, 32_768, 1_000) == 32
    assert rows_at_once(2, 2**30, None) == 1
    assert rows_at_once(4_096, 32_768, None, "cuda") == 512  # 8 parts instead of 128: each is many small kernels
    assert rows_at_once(4_096, 4_096, None, "cuda") == 4_096
    assert rows_at_once(32_768, 32_768, 100, "cuda") == 100
    with pytest.raises(ValueError, match="chunk_size counts rows from 1, got 0"):
        rows_at_once(4, 4, 0)


class Largest(TorchDispatchMode):
    """Note the number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("count_as", COUNT_AS)
@pytest.mark.parametrize("name", LOSSES)
def test_no_operation_makes_more_than_a_chunk_of_logits(name, count_as, monkeypatch):
    def largest(**options):
        with Largest() as seen:
            value_and_gradients(LOSSES[name], *draws(), duplicates=duplicates(count_as), **options)
        return seen.elements

    assert largest() == NUM_PAIRS * NUM_PAIRS  # the measure sees the matrix where there is one
    vectors = NUM_PAIRS * draws()[0].shape[1]
    assert largest(chunk_size=2) == vectors
    monkeypatch.setattr(loss_chunks, "MAX_LOGITS", NUM_PAIRS * NUM_PAIRS - 1)
    monkeypatch.setattr(loss_chunks, "CHUNK_LOGITS", 6 * NUM_PAIRS)
    assert largest() == 6 * NUM_PAIRS


def peak_growth(num_pairs):
    """Return by how many bytes the most memory that this process held grew through a loss and its gradients."""
    torch.set_num_threads(1)
    vectors = [torch.nn.functional.normalize(torch.randn(num_pairs, 16), dim=1).requires_grad_() for _ in range(2)]
    scale = torch.tensor(10.0, requires_grad=True)
    LOSSES["clip"](*(v[:8] for v in vectors), scale).backward()  # what is made once is made now
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    LOSSES["clip"](*vectors, scale).backward()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_a_batch_of_16384_needs_far_less_memory_than_one_matrix_of_its_logits():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["loss_oracle"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        growth = process.submit(peak_growth, 16_384).result()
    assert growth < 4 * 16_384**2 / 2  # float32; the plain form holds several such matrices
