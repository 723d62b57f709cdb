"""What a Soft MoE layer must do, whatever its numbers: oracles, invariants, masks, precision, statistics."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from softmoe_clip.moe import Experts, Routing, SoftMoE, collect_routing


def slot_by_slot(tokens, mask, layer):
    """One image at a time, one slot at a time, one token at a time, in NumPy float64."""
    phi, scale = layer.slot_embed.detach().double().numpy(), layer.router_scale.item()
    w_in, b_in, w_out, b_out = (p.detach().double().numpy() for p in layer.experts.parameters())
    num_experts, num_slots = phi.shape[1:]
    out = np.zeros_like(tokens)
    for b, image in enumerate(tokens):
        real = np.flatnonzero(mask[b])
        logits = np.zeros((len(image), num_experts, num_slots))
        for n in real:
            unit = image[n] / np.sqrt((image[n] ** 2).sum() + 1e-6)
            for e in range(num_experts):
                for s in range(num_slots):
                    slot = phi[:, e, s] / np.sqrt((phi[:, e, s] ** 2).sum() + 1e-6)
                    logits[n, e, s] = scale * unit @ slot
        weights = np.exp(logits)
        for e in range(num_experts):
            for s in range(num_slots if len(real) else 0):
                share = weights[real, e, s] / weights[real, e, s].sum()
                mixed = share @ image[real]
                hidden = mixed @ w_in[e] + b_in[e]
                hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
                result = hidden @ w_out[e] + b_out[e]
                for n in real:
                    out[b, n] += weights[n, e, s] / weights[n].sum() * result
    return out


def different_experts(layer):
    """Experts start alike; tests need them apart, and a scale that sharpens."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        layer.router_scale.fill_(4)
    return layer


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return different_experts(SoftMoE(width=12, num_experts=4, slots_per_expert=2, hidden=20).double())


@pytest.fixture
def tokens():
    return torch.randn(3, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask():
    mask = torch.arange(7) < torch.tensor([[7], [4], [0]])
    return mask[:, torch.randperm(7, generator=torch.Generator().manual_seed(2))]


def test_the_layer_equals_a_loop_over_images_slots_and_tokens(layer, tokens):
    expected = slot_by_slot(tokens.numpy(), np.ones((3, 7), bool), layer)
    np.testing.assert_allclose(layer(tokens).detach().numpy(), expected, atol=1e-12)


def test_the_masked_layer_equals_the_loop_over_real_tokens(layer, tokens, mask):
    expected = slot_by_slot(tokens.numpy(), mask.numpy(), layer)
    np.testing.assert_allclose(layer(tokens, mask).detach().numpy(), expected, atol=1e-12)


def test_experts_equal_the_einsum_form_and_its_gradients():
    torch.manual_seed(0)
    experts = different_experts_only(Experts(5, 6, 9).double())
    slots = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    hidden = torch.einsum("besd,edf->besf", slots, experts.w_in) + experts.b_in[:, None]
    oracle = torch.einsum("besf,efd->besd", F.gelu(hidden, approximate="tanh"), experts.w_out) + experts.b_out[:, None]
    cotangent = torch.randn_like(slots)
    torch.testing.assert_close(experts(slots), oracle)
    inputs = (slots, *experts.parameters())
    ours = torch.autograd.grad((experts(slots) * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((oracle * cotangent).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def different_experts_only(experts):
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(torch.randn_like(parameter))
    return experts


def test_dispatch_sums_to_one_over_tokens_and_combine_over_all_slots(layer, tokens):
    routing = layer.route(tokens)
    assert routing.dispatch.shape == routing.combine.shape == (3, 7, 4, 2)
    torch.testing.assert_close(routing.dispatch.sum(1), torch.ones(3, 4, 2, dtype=torch.float64))
    torch.testing.assert_close(routing.combine.sum((2, 3)), torch.ones(3, 7, dtype=torch.float64))


def test_an_image_gives_the_same_output_alone_as_in_any_batch(layer, tokens):
    alone = torch.cat([layer(tokens[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(layer(tokens), alone, atol=1e-13, rtol=0)
    neighbours = torch.cat([tokens[:1], torch.randn(4, 7, 12, dtype=torch.float64) * 100])
    torch.testing.assert_close(layer(neighbours)[0], alone[0], atol=1e-13, rtol=0)


def test_permuting_tokens_permutes_the_outputs(layer, tokens):
    order = torch.randperm(7)
    torch.testing.assert_close(layer(tokens[:, order]), layer(tokens)[:, order])
    assert not torch.allclose(layer(tokens[:, order]), layer(tokens))


def test_an_unknown_activation_is_refused_when_the_layer_is_made():
    with pytest.raises(ValueError, match="no activation 'relu': take gelu_tanh, gelu, quick_gelu"):
        SoftMoE(8, num_experts=2, activation="relu")


def test_padding_never_changes_a_real_token(layer, tokens):
    real = torch.ones(3, 7, dtype=torch.bool)
    for garbage in (0.0, 1e6, float("nan"), float("inf")):
        padded = torch.cat([tokens, torch.full((3, 5, 12), garbage, dtype=torch.float64)], 1).requires_grad_()
        mask = torch.cat([real, torch.zeros(3, 5, dtype=torch.bool)], 1)
        out = layer(padded, mask)
        torch.testing.assert_close(out[:, :7], layer(tokens), atol=1e-12, rtol=0)
        gradients = torch.autograd.grad(out.sum(), [padded, *layer.parameters()])
        expected = torch.autograd.grad(layer(tokens).sum(), list(layer.parameters()))
        assert (gradients[0][:, 7:] == 0).all()
        torch.testing.assert_close(gradients[1:], expected)


def test_a_layer_that_forgets_the_mask_is_caught(layer, tokens, mask):
    expected = slot_by_slot(tokens.numpy(), mask.numpy(), layer)
    assert np.abs(layer(tokens).detach().numpy() - expected).max() > 0.1


def test_masked_tokens_give_and_take_nothing(layer, tokens, mask):
    routing, out = layer.route(tokens, mask), layer(tokens, mask)
    assert all((weights[~mask] == 0).all() for weights in routing)
    assert (out[~mask] == 0).all()


def test_an_example_of_padding_alone_gives_zeros_and_finite_gradients(layer, tokens):
    nothing = torch.zeros(3, 7, dtype=torch.bool)
    tokens.requires_grad_()
    out = layer(tokens, nothing)
    assert (out == 0).all()
    assert all((weights == 0).all() for weights in layer.route(tokens, nothing))
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in [tokens, *layer.parameters()])


def test_zero_tokens_have_finite_gradients(layer):
    tokens = torch.zeros(1, 3, 12, dtype=torch.float64, requires_grad=True)
    layer(tokens).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [tokens, *layer.parameters()])


def test_gradients_equal_finite_differences(tokens, mask):
    torch.manual_seed(0)
    layer = different_experts(SoftMoE(4, 2, 2, 3).double())
    tokens = tokens[:, :4, :4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, mask[:, :4]), (tokens, *layer.parameters()))


def test_without_normalisation_the_logits_are_plain_products(tokens):
    layer = SoftMoE(12, 4, 2, normalize=False).double()
    expected = torch.einsum("bnd,des->bnes", tokens, layer.slot_embed).softmax(1)
    torch.testing.assert_close(layer.route(tokens).dispatch, expected)


def test_autocast_keeps_the_router_in_float32_and_runs_the_experts_in_bfloat16():
    torch.manual_seed(0)
    layer, tokens = different_experts(SoftMoE(32, 4, 2)), torch.randn(2, 16, 32)
    seen = []
    layer.experts.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        routing, out = layer.route(tokens), layer(tokens)
    for ours, exact in zip(routing, layer.route(tokens), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)
    assert seen == [torch.bfloat16]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(tokens), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_layer_still_routes_in_float32(dtype):
    layer, tokens = SoftMoE(16, 4).to(dtype), torch.randn(2, 9, 16).to(dtype)
    assert layer.route(tokens).dispatch.dtype == torch.float32
    assert layer(tokens).dtype == dtype


def test_float64_tokens_are_routed_in_float64(layer, tokens):
    assert layer.route(tokens).dispatch.dtype == torch.float64


def test_nothing_is_collected_while_no_collector_is_open(layer, tokens):
    before = dict(vars(layer))
    layer(tokens)
    with collect_routing() as collected:
        pass
    layer(tokens)
    assert collected.means() == {}
    assert dict(vars(layer)) == before


def test_a_collector_sees_entropies_largest_weights_and_the_scale(layer, tokens):
    with collect_routing() as collected:
        layer(tokens)
    routing, found = layer.route(tokens), collected.means()["soft_moe"]
    dispatch, combine = (weights.flatten(2) for weights in routing)
    slots = [[image.T @ weights[:, i] for i in range(8)] for image, weights in zip(tokens, dispatch, strict=True)]
    pairs = [(image[i], image[j]) for image in slots for i in range(8) for j in range(i)]
    expected = {
        "dispatch_entropy": -(dispatch * dispatch.log()).sum(1).mean() / np.log(7),
        "combine_entropy": -(combine * combine.log()).sum(2).mean() / np.log(8),
        "dispatch_max": dispatch.amax(1).mean(),
        "combine_max": combine.amax(2).mean(),
        "slot_similarity": torch.stack([torch.cosine_similarity(*pair, dim=0) for pair in pairs]).mean(),
        "dead_experts": torch.zeros(()),
        "router_scale": layer.router_scale,
    }
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-5)
    assert collected.summary()["routing/soft_moe/router_scale"] == 4


def test_uniform_routing_has_entropy_one(tokens):
    layer = SoftMoE(12, 4, 2).double()
    torch.nn.init.zeros_(layer.router_scale)
    with collect_routing() as collected:
        layer(tokens)
    found = collected.means()["soft_moe"]
    assert found["dispatch_entropy"] == pytest.approx(1)
    assert found["combine_entropy"] == pytest.approx(1)
    assert found["dispatch_max"] == pytest.approx(1 / 7)


def test_padding_is_left_out_of_the_statistics(layer, tokens):
    mask = torch.arange(7) < torch.tensor([[5], [5], [0]])
    with collect_routing() as padded:
        layer(tokens, mask)
    with collect_routing() as plain:
        layer(tokens[:2, :5])
    assert padded.means()["soft_moe"] == pytest.approx(plain.means()["soft_moe"], rel=1e-5)


def test_gradient_checkpointing_with_an_open_collector_changes_no_number(layer, tokens):
    tokens.requires_grad_()
    plain = torch.autograd.grad(layer(tokens).square().sum(), tokens)[0]
    with collect_routing() as collected:
        loss = torch.utils.checkpoint.checkpoint(layer, tokens, use_reentrant=False).square().sum()
        again = torch.autograd.grad(loss, tokens)[0]
    torch.testing.assert_close(again, plain)
    with collect_routing() as once:
        layer(tokens)
    assert collected.means() == once.means()


COMPILED = """
import torch
from softmoe_clip.moe import SoftMoE, collect_routing

torch.manual_seed(0)
layer, tokens = SoftMoE(16, 4, 2), torch.randn(2, 9, 16)
for parameter in layer.experts.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
compiled = torch.compile(layer, fullgraph=True)
torch.testing.assert_close(compiled(tokens), layer(tokens))
with collect_routing() as collected:
    torch.testing.assert_close(compiled(tokens), layer(tokens))
assert len(collected.reports["soft_moe"]) == 2
compiled(tokens)
assert len(collected.reports["soft_moe"]) == 2
"""


@pytest.mark.slow
def test_a_compiled_layer_equals_the_plain_one_and_still_reports():
    # In a process of its own: the shape checks that the tests switch on cannot be compiled.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_routing_is_a_pair_of_dispatch_and_combine(layer, tokens):
    assert isinstance(layer.route(tokens), Routing)
    assert Routing._fields == ("dispatch", "combine")
