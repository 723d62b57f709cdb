"""Float32 matrix products on CPUs where torch's usual library leaves half of the machine idle.

torch multiplies float32 matrices with MKL, which takes AVX-512 on Intel's processors only. oneDNN, which torch carries
too, takes it on AMD's as well, and is 2.2 times as fast there. torch has no switch for that choice alone: it hands
float32 products to oneDNN only where bfloat16 inside of them is allowed. Kernels that round so are made for AMX, which
AMD's processors do not have; without it oneDNN's plain float32 kernel runs, as its own log says (ONEDNN_VERBOSE=1:
brg_matmul:avx512_core). `onednn_is_exact` asks the machine itself.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor


def bmm(
    left: Float[Tensor, "e m i"], right: Float[Tensor, "e i o"], bias: Float[Tensor, "e 1 o"] | None = None
) -> Float[Tensor, "e m o"]:
    """Multiply matrix by matrix and add the bias: torch.bmm or torch.baddbmm, by the faster library."""
    if takes_onednn(left) and right.dtype == left.dtype:
        return _Product.apply(left, right, bias)
    return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)


class _Product(torch.autograd.Function):
    """A product whose gradients, of every order, are products by the same library."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        with onednn():
            return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])

    @staticmethod
    def jvp(ctx, left_change: Tensor | None, right_change: Tensor | None, bias_change: Tensor | None) -> Tensor:
        left, right = ctx.saved_tensors
        terms = [bias_change] if bias_change is not None else []
        terms += [bmm(left_change, right)] if left_change is not None else []
        terms += [bmm(left, right_change)] if right_change is not None else []
        return sum(terms[1:], start=terms[0]).expand(*left.shape[:2], right.shape[2])

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "e m o"]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        for_left, for_right, for_bias = ctx.needs_input_grad
        grad = grad.contiguous()  # that of a sum is one number for all, which each product would spread out anew
        return (
            gradient_of_left(left, right, grad) if for_left else None,
            bmm(left.mT, grad) if for_right else None,
            grad.sum(1, keepdim=True) if for_bias else None,
        )


def gradient_of_left(left: Tensor, right: Tensor, grad: Tensor) -> Tensor:
    """Return grad @ right^T, lying in memory as `left` does: what computed a transposed matrix goes on faster."""
    return bmm(right, grad.mT).mT if left.mT.is_contiguous() else bmm(grad, right.mT)


def products_with(tensor: Tensor) -> AbstractContextManager:
    """Let products with this tensor run by the faster library inside; outside of autograd's view only."""
    return onednn() if takes_onednn(tensor) else nullcontext()


def takes_onednn(tensor: Tensor) -> bool:
    """Say whether its products go to oneDNN: float32 on such a CPU, neither compiled nor under autocast."""
    if torch.compiler.is_compiling() or tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        return False
    return not torch.is_autocast_enabled("cpu") and onednn_is_faster()


WITH_ONEDNN = "bf16"  # what torch calls it
_lock = Lock()
_num_inside = 0
_before = ""


@contextmanager
def onednn() -> Iterator[None]:
    """Give float32 products inside to oneDNN. torch's setting is the whole process's: the last thread puts it back."""
    global _num_inside, _before
    matmul = torch.backends.mkldnn.matmul
    with _lock:
        if _num_inside == 0:
            _before, matmul.fp32_precision = matmul.fp32_precision, WITH_ONEDNN
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if _num_inside == 0:
                put_back()


def put_back() -> None:
    """Set what was set before, unless somebody has set something else meanwhile."""
    matmul = torch.backends.mkldnn.matmul
    if matmul.fp32_precision == WITH_ONEDNN:
        matmul.fp32_precision = _before


def forget_other_threads() -> None:
    """In a forked child, where no other thread multiplies on."""
    global _num_inside, _lock
    _lock = Lock()
    if _num_inside:
        _num_inside = 0
        put_back()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=forget_other_threads)


@cache
def onednn_is_faster() -> bool:
    """Say whether this is a CPU of AMD's with AVX-512 and without AMX, where oneDNN computes float32 in float32."""
    cpu = torch.cpu.get_capabilities()
    has = cpu.get("avx512_bw", False) and not cpu.get("amx_tile", False)
    if not has or "AMD" not in cpu.get("cpu_name", ""):
        return False
    # In a thread of its own, where no mode of the caller's (fake tensors, counters, tracing) sees the question.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(onednn_is_exact).result()


def onednn_is_exact() -> bool:
    """Multiply whole numbers of nine bits, which bfloat16 cuts; float32 holds them and all their sums."""
    numbers = torch.arange(64 * 48, device="cpu").remainder(512).view(1, 64, 48)
    with onednn():
        found = torch.bmm(numbers.float(), numbers.float().mT)
    return torch.equal(found.long(), numbers @ numbers.mT)
