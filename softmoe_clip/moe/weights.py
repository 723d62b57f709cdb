"""The two steps of Soft MoE's routing with their gradients written out, so that backward keeps no logits.

Autograd would keep the logits before they are divided by the tokens' norms, float32 copies of 16-bit tokens, and each
softmax twice where there is a mask: (b, n, slots) numbers each, the largest tensors of a layer with many slots.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_clip.moe.products import products_with

# Inside the square root, as in the reference's code; the paper's x / (|x| + eps) differs for tiny vectors.
NORM_EPS = 1e-6


class CosineLogits(torch.autograd.Function):
    """tokens (b, n, d), divided by their norms, times slots (d, k), in the slots' precision."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(tokens: Float[Tensor, "b n d"], slots: Float[Tensor, "d k"]) -> Float[Tensor, "b n k"]:
        exact = tokens.to(slots.dtype)
        with products_with(exact):
            # Dividing the logits by the tokens' norms instead of the tokens saves a copy of the tokens.
            return (exact @ slots).mul_(inverse_norm(exact, -1))

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "b n k"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "d k"]]:
        tokens, slots = ctx.saved_tensors
        exact = tokens.to(slots.dtype)
        inverse = inverse_norm(exact, -1)
        grad = grad * inverse
        with products_with(exact):
            grad_slots = exact.flatten(0, 1).T @ grad.flatten(0, 1)
            grad_exact = grad @ slots.T
        # What changes a token's length changes no cosine: sum over k of grad * logits is the token's own projection.
        along = torch.einsum("bnd,bnd->bn", grad_exact, exact)[..., None]
        return torch.addcmul(grad_exact, exact, along * inverse.square(), value=-1).to(tokens.dtype), grad_slots


class MaskedSoftmax(torch.autograd.Function):
    """Softmax of logits (b, n, k) along `dim`, over real tokens only; masked tokens get zeros, also where all are."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Float[Tensor, "b n k"], mask: Bool[Tensor, "b n"], dim: int) -> Float[Tensor, "b n k"]:
        # A finite fill and a product: an example without any real token gives zeros, where -inf would give NaN.
        filled = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
        return filled.softmax(dim).mul_(mask[..., None])

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.dim = inputs[2]

    @staticmethod
    def backward(ctx, grad: Float[Tensor, "b n k"]) -> tuple[Float[Tensor, "b n k"], None, None]:
        (weights,) = ctx.saved_tensors
        return torch._softmax_backward_data(grad, weights, ctx.dim, weights.dtype), None, None


def inverse_norm(vectors: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*reduced"]:
    """1 / sqrt(sum of squares + eps) along `dim`, which is kept; vector_norm makes no copy of the squares."""
    return torch.rsqrt(torch.linalg.vector_norm(vectors, dim=dim, keepdim=True).square() + NORM_EPS)
