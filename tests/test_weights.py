"""Cosines and masked softmaxes with gradients of their own, against what autograd makes of the plain formulas."""

import pytest
import torch

from softmoe_clip.moe import SoftMoE
from softmoe_clip.moe.weights import NORM_EPS, CosineLogits, MaskedSoftmax

B, N, D, E, S = 3, 11, 8, 5, 2
MASK = torch.arange(N) < torch.tensor([[N], [4], [0]])


def plain_cosines(tokens, slots):
    return (tokens / (tokens.square().sum(-1, keepdim=True) + NORM_EPS).sqrt()) @ slots


def plain_softmax(logits, dim):
    weights = logits.masked_fill(~MASK[..., None], -torch.inf).softmax(dim)
    return torch.where(MASK[..., None], weights, 0)


def gradients(function, *inputs):
    """Return what `function` gives for fresh copies of `inputs`, and the gradients of a fixed weighting of it."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    out = function(*inputs)
    weighting = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weighting).sum(), inputs)


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("length", [1, 1e-3, 1e-5], ids=["ordinary", "small", "below the square root of eps"])
def test_cosines_and_their_gradients_are_those_of_the_formula(length):
    tokens, slots = length * drawn(B, N, D), drawn(D, E)
    tokens[0, 0] = 0
    for ours, plain in zip(
        gradients(CosineLogits.apply, tokens, slots), gradients(plain_cosines, tokens, slots), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("agrees", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"])
def test_derivatives_agree_with_finite_differences(agrees):
    tokens, slots = drawn(B, N, D).requires_grad_(), drawn(D, E).requires_grad_()
    assert agrees(CosineLogits.apply, (tokens, slots))
    logits = drawn(B, N, E).requires_grad_()
    assert agrees(lambda x: MaskedSoftmax.apply(x, MASK, 1), logits)
    assert agrees(lambda x: MaskedSoftmax.apply(x, MASK, 2), logits)


@pytest.mark.parametrize("dim", [1, 2])
def test_masked_softmax_and_its_gradient_are_those_of_the_formula(dim):
    logits = 3 * drawn(B, N, E)
    ours = gradients(lambda x: MaskedSoftmax.apply(x, MASK, dim), logits)
    plain = gradients(lambda x: plain_softmax(x, dim), logits)
    torch.testing.assert_close(ours[0], plain[0])
    # Where nothing is real the formula's gradient is NaN, ours must be zero.
    torch.testing.assert_close(ours[1], plain[1].nan_to_num())


def test_16_bit_tokens_are_kept_as_they_are_and_get_gradients_of_their_precision():
    tokens, slots = drawn(B, N, D).bfloat16(), drawn(D, E).float()
    ours, plain = (
        gradients(CosineLogits.apply, tokens, slots),
        gradients(plain_cosines, tokens.float(), slots),
    )
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1].float(), plain[1], rtol=0.01, atol=0.01)
    torch.testing.assert_close(ours[2], plain[2])


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_of_all_that_is_as_large_as_the_weights_backward_keeps_dispatch_and_combine_alone(mask):
    layer, kept = SoftMoE(D, E, S, hidden=7), {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(torch.randn(B, N, D, requires_grad=True), mask)
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    sizes = [tensor.numel() for pointer, tensor in kept.items() if pointer not in own]
    assert sizes.count(B * N * E * S) == 2
    assert not {layer.experts.w_in.numel(), layer.experts.w_out.numel()} & set(sizes)
    out.sum().backward()


def test_a_layers_second_derivatives_agree_with_finite_differences():
    torch.manual_seed(0)
    layer = SoftMoE(4, 3, 2, hidden=5).double()
    tokens = drawn(2, 5, 4).requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    assert torch.autograd.gradgradcheck(lambda x: layer(x), tokens)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, mask), tokens)


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_torch_func_gives_the_gradients_of_each_example(mask):
    layer, tokens = SoftMoE(D, E, S, hidden=7).double(), drawn(B, N, D)
    weights = dict(layer.named_parameters())

    def energy(weights, example, real=None):
        real = None if real is None else real[None]
        return torch.func.functional_call(layer, weights, (example[None], real)).square().sum()

    given = (tokens,) if mask is None else (tokens, mask)
    found = torch.func.vmap(torch.func.grad(energy), in_dims=(None, *(0 for _ in given)))(weights, *given)
    for i in range(B):
        expected = torch.autograd.grad(energy(weights, *(value[i] for value in given)), weights.values())
        for name, gradient in zip(weights, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient)
