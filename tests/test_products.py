"""Float32 products by oneDNN: exact, differentiable as torch's own, and without a trace in torch's settings."""

import os
import subprocess
import sys
from threading import Thread

import pytest
import torch

from softmoe_clip.moe import SoftMoE, products
from softmoe_clip.moe.products import bmm, onednn

SHAPES = [(1, 1, 1, 1), (3, 5, 7, 2), (2, 64, 48, 64), (4, 16, 33, 130), (2, 196, 128, 96), (16, 1, 384, 17)]


@pytest.fixture
def by_onednn(monkeypatch):
    """Take oneDNN wherever it computes in float32; where it rounds (AMX) the library never takes it."""
    if not products.onednn_is_exact():
        pytest.skip("this CPU's oneDNN rounds to bfloat16")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def transposed(matrices: torch.Tensor) -> torch.Tensor:
    """Keep the values, but let columns lie together in memory."""
    return matrices.mT.contiguous().mT


@pytest.mark.parametrize(("e", "m", "i", "o"), SHAPES)
@pytest.mark.parametrize("lay_left", [torch.Tensor.contiguous, transposed])
@pytest.mark.parametrize("lay_right", [torch.Tensor.contiguous, transposed])
def test_whole_numbers_that_bfloat16_cannot_hold_are_multiplied_exactly(by_onednn, e, m, i, o, lay_left, lay_right):
    """Not one size or layout may fall to a kernel that rounds; the sums stay far below 2^24."""
    left, right = torch.randint(-200, 201, (e, m, i)) | 1, torch.randint(-200, 201, (e, i, o)) | 257
    found = bmm(lay_left(left.float()), lay_right(right.float()))
    assert torch.equal(found.long(), left @ right)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("lay_left", [torch.Tensor.contiguous, transposed])
def test_values_and_gradients_of_both_orders_are_torchs(by_onednn, with_bias, lay_left):
    def derivatives(multiply, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        left, right = (torch.randn(shape, dtype=torch.float64) for shape in [(3, 20, 12), (3, 12, 9)])
        bias = torch.randn(3, 1, 9, dtype=torch.float64)
        inputs = [x.to(dtype).requires_grad_() for x in (lay_left(left), right, bias)][: 2 + with_bias]
        out = multiply(*inputs)
        first = torch.autograd.grad(out.sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
        return [out, *first, *second]

    def plain(left, right, bias=0):
        return left @ right + bias

    found, expected = derivatives(bmm, torch.float32), derivatives(plain, torch.float64)
    assert len(found) == len(expected) == 5 + 2 * with_bias
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5 * theirs.abs().max().item())


def test_a_gradient_lies_in_memory_as_its_operand(by_onednn):
    weights = torch.rand(2, 9, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(bmm(weights.mT, torch.rand(2, 9, 7)).sum(), weights)
    assert grad.is_contiguous()


def test_the_layer_is_that_of_torchs_own_products(by_onednn, monkeypatch):
    torch.manual_seed(0)
    layer, tokens = SoftMoE(24, 6, 2), torch.randn(3, 10, 24)
    mask = torch.arange(10) < torch.tensor([[10], [4], [7]])

    def results() -> list[torch.Tensor]:
        given = tokens.clone().requires_grad_()
        out = layer(given, mask)
        return [out, *torch.autograd.grad(out.square().sum(), [given, *layer.parameters()])]

    found = results()
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    for ours, theirs in zip(found, results(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_torch_func_sees_through(by_onednn):
    left, right = torch.randn(4, 2, 5, 3), torch.randn(4, 2, 3, 6)
    torch.testing.assert_close(torch.func.vmap(bmm)(left, right), left @ right)
    per_example = torch.func.vmap(torch.func.grad(lambda a, b: bmm(a, b).sum()))(left, right)
    torch.testing.assert_close(per_example, right.sum(-1)[..., None, :].expand_as(left))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode is made with it
def test_changes_go_forward_too(by_onednn):
    given, changes = [torch.randn(2, 5, 3), torch.randn(2, 3, 6), torch.randn(2, 1, 6)], []
    for i, value in enumerate(given):
        change = torch.randn_like(value)
        _, found = torch.func.jvp(lambda x, i=i: bmm(*given[:i], x, *given[i + 1 :]), (value,), (change,))
        left, right, bias = (change if i == j else other for j, other in enumerate(given))
        changes.append(found)
        torch.testing.assert_close(found, bias.expand(2, 5, 6) if i == 2 else left @ right)
    _, found = torch.func.jvp(lambda *x: bmm(*x), tuple(given), tuple(map(torch.ones_like, given)))
    assert found.shape == (2, 5, 6)


def test_autocast_and_other_precisions_stay_torchs(by_onednn):
    left, right = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert bmm(left, right).dtype == torch.bfloat16
    assert torch.equal(bmm(left.double(), right.double()), left.double() @ right.double())


def test_torchs_setting_is_put_back_after_errors_too(by_onednn):
    before = setting()
    with pytest.raises(RuntimeError, match="size"), onednn():
        torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 5, 6))
    assert setting() == before
    torch.get_float32_matmul_precision()  # which torch refuses to tell while the setting holds


def test_what_somebody_else_sets_meanwhile_stays(by_onednn):
    before = torch.get_float32_matmul_precision()
    try:
        with onednn():
            torch.set_float32_matmul_precision("high")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_forked_from_within_starts_afresh(by_onednn):
    with onednn():
        child = os.fork()
        if child == 0:
            os._exit(int(setting() == "bf16" or products._num_inside != 0))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert setting() == "bf16"


FIRST_USE = """
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from softmoe_clip.moe import SoftMoE, products

def count():
    with FlopCounterMode(display=False) as counter:
        layer(tokens)
    return counter.get_total_flops()

layer, tokens = SoftMoE(8, 2), torch.randn(2, 5, 8)
expected = count()
for first in (count, lambda: make_fx(layer)(tokens)):
    products.onednn_is_faster.cache_clear()
    first()
products.onednn_is_faster.cache_clear()
assert count() == expected, (count(), expected)
products.onednn_is_faster.cache_clear()
with FakeTensorMode(allow_non_fake_inputs=True):
    layer(tokens)
products.onednn_is_faster.cache_clear()
with torch.device("meta"):
    layer(tokens)
"""


def test_no_mode_of_the_callers_sees_the_question_whether_onednn_is_exact(process_environment):
    subprocess.run([sys.executable, "-c", FIRST_USE], env=process_environment, check=True)


def test_threads_that_overlap_put_it_back_too(by_onednn):
    before = setting()
    first, second = onednn(), onednn()
    first.__enter__()
    other = Thread(target=second.__enter__)
    other.start()
    other.join()
    first.__exit__(None, None, None)
    assert setting() == "bf16"  # the second one still multiplies
    second.__exit__(None, None, None)
    assert setting() == before
