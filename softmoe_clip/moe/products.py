"""Batched matrix products in float32, on CPUs where torch's usual library leaves half of the machine idle by the other.

torch multiplies float32 matrices with MKL, which takes AVX-512 on Intel's processors only. oneDNN, which torch also
carries, takes it on AMD's too, and is 2.2 times as fast there. torch has no switch for that choice alone: it hands
float32 products to oneDNN only where bfloat16 inside of them is allowed. Kernels that round so exist for AMX, nowhere
else; without AMX what runs is oneDNN's plain float32 kernel. `onednn_is_exact` asks the machine itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor


def bmm(
    left: Float[Tensor, "e m i"], right: Float[Tensor, "e i o"], bias: Float[Tensor, "e 1 o"] | None = None
) -> Float[Tensor, "e m o"]:
    """Multiply matrix by matrix and add the bias; as torch.bmm and torch.baddbmm, to float error."""
    if takes_onednn(left) and right.dtype == torch.float32:
        return _Product.apply(left, right, bias)
    return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)


class _Product(torch.autograd.Function):
    """A product whose backward runs with the same library."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        with onednn():
            return torch.bmm(left, right) if bias is None else torch.baddbmm(bias, left, right)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        left, right, _ = inputs
        ctx.save_for_backward(left, right)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        for_left, for_right, for_bias = ctx.needs_input_grad
        grad = grad.contiguous()  # a sum's gradient is one number everywhere, which each product would spread out anew
        return (
            bmm(grad, right.mT) if for_left else None,
            bmm(left.mT, grad) if for_right else None,
            grad.sum(1, keepdim=True) if for_bias else None,
        )


def takes_onednn(tensor: Tensor) -> bool:
    """Say whether products with this tensor go to oneDNN: float32 on such a CPU, not compiled, not under autocast."""
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and onednn_is_faster()
    )


@contextmanager
def onednn(use: bool = True) -> Iterator[None]:
    """Let oneDNN do float32 products inside; only where `takes_onednn`."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if use:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        if use:
            matmul.fp32_precision = before


@cache
def onednn_is_faster() -> bool:
    """Say whether this is a CPU of AMD's with AVX-512, without AMX, where oneDNN computes float32 in float32."""
    cpu = torch.cpu.get_capabilities()
    named_amd = "AMD" in cpu.get("cpu_name", "")
    return named_amd and cpu.get("avx512_bw", False) and not cpu.get("amx_tile", False) and onednn_is_exact()


def onednn_is_exact() -> bool:
    """Multiply whole numbers that float32 holds and bfloat16 does not, and look at each result."""
    values = torch.arange(64 * 48, dtype=torch.float32).remainder(512).reshape(1, 64, 48)
    with onednn():
        found = torch.bmm(values, values.mT)
    return torch.equal(found.double(), values.double() @ values.double().mT)
