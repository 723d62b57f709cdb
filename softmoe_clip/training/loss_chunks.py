"""A loss that is a mean over rows of logits, computed some rows at a time: the whole matrix never exists."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "rows z"]
Columns = Float[Tensor, "all z"]
Scalar = Float[Tensor, ""]

# (rows, columns, logit_scale, logit_bias, number of the first row) -> the mean over these rows
RowLoss = Callable[[Rows, Columns, Scalar, Scalar | None, int], Scalar]

# More logits than this never exist at a time: 64 MiB in float32, of which a loss holds about four copies.
MAX_LOGITS = 2**24
# On a CPU chunks are smaller: those that stay in its cache take half the time of the whole, and 20 MiB in all. A GPU
# would wait for the CPU to ask for each of them.
CHUNK_LOGITS = 2**20


def over_rows(
    row_loss: RowLoss,
    rows: Rows,
    columns: Columns,
    logit_scale: Scalar,
    logit_bias: Scalar | None,
    chunk_size: int | None = None,
) -> Scalar:
    """Return the mean of a loss over all rows, at most `chunk_size` of them at a time, and fewer where logits are many.

    Memory grows with chunk * columns, forward and backward. What fits at once is computed in the plain way.
    """
    size = rows_at_once(len(rows), len(columns), chunk_size, rows.device.type)
    inputs = rows, columns, logit_scale, logit_bias
    if size >= len(rows):
        return row_loss(*inputs, 0)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _InChunks.apply(row_loss, size, *inputs)
    parts = [(rows[first : first + size], first) for first in range(0, len(rows), size)]
    return sum(row_loss(part, *inputs[1:], first) * (len(part) / len(rows)) for part, first in parts)


def rows_at_once(num_rows: int, num_columns: int, chunk_size: int | None, device: str = "cpu") -> int:
    """Return how many rows of logits are computed together."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size counts rows from 1, got {chunk_size}")
    size = min(num_rows, chunk_size or num_rows)
    fits = chunk_size is None and size * num_columns <= MAX_LOGITS
    return size if fits else max(1, min(size, (CHUNK_LOGITS if device == "cpu" else MAX_LOGITS) // num_columns))


class _InChunks(torch.autograd.Function):
    """Gradients are computed with the loss, chunk by chunk; backward only scales them, so nothing is computed twice."""

    @staticmethod
    def forward(ctx, row_loss: RowLoss, size: int, *inputs: Tensor | None) -> Tensor:
        rows, needed = inputs[0], ctx.needs_input_grad[2:]
        gradients = [torch.zeros_like(t) if need else None for t, need in zip(inputs, needed, strict=True)]
        total = rows.new_zeros(())
        for first in range(0, len(rows), size):
            chunk = slice(first, first + size)
            leaves = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip((rows[chunk], *inputs[1:]), needed, strict=True)
            ]
            with torch.enable_grad():
                loss = row_loss(*leaves, first) * (len(leaves[0]) / len(rows))
                found = torch.autograd.grad(loss, [leaf for leaf, need in zip(leaves, needed, strict=True) if need])
            total += loss.detach()
            sums = [gradients[0][chunk] if needed[0] else None, *gradients[1:]]
            for so_far, gradient in zip([g for g in sums if g is not None], found, strict=True):
                so_far += gradient
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a loss computed in chunks has no second derivatives: its gradients are kept as numbers")
        return None, None, *(None if found is None else found * grad for found in ctx.saved_tensors)
