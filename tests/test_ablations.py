"""The paper's ablations of the router against a loop over images, slots and tokens."""

import numpy as np
import pytest
import torch

from softmoe_clip.moe import Routing, SoftMoE, collect_routing
from softmoe_clip.moe.ablations import IdentityMoE, SoftUniformMoE, UniformMoE, UniformSoftMoE

ROUTERS = {
    "uniform": UniformMoE,
    "identity": IdentityMoE,
    "soft_uniform": SoftUniformMoE,
    "uniform_soft": UniformSoftMoE,
}
E, S = 4, 2


def soft_weights(image, layer):
    """exp(logit) of every token and slot of one image without padding."""
    phi, scale = layer.slot_embed.detach().double().numpy(), layer.router_scale.item()
    weights = np.zeros((len(image), E, S))
    for n, token in enumerate(image):
        for e in range(E):
            for s in range(S):
                unit = token / np.sqrt((token**2).sum() + 1e-6)
                slot = phi[:, e, s] / np.sqrt((phi[:, e, s] ** 2).sum() + 1e-6)
                weights[n, e, s] = np.exp(scale * unit @ slot)
    return weights


def slot_by_slot(tokens, mask, layer, router):
    """One image at a time, one slot at a time, one token at a time, in NumPy float64."""
    w_in, b_in, w_out, b_out = (p.detach().double().numpy() for p in layer.experts.parameters())
    out = np.zeros_like(tokens)
    for b, image in enumerate(tokens):
        real = np.flatnonzero(mask[b])
        weights = None if router in ("uniform", "identity") or not len(real) else soft_weights(image[real], layer)
        for e in range(E):
            for s in range(S if len(real) else 0):
                slot = np.zeros(image.shape[1])
                for i, n in enumerate(real):
                    if router == "identity":
                        share = float(n == e * S + s)
                    elif router == "soft_uniform":
                        share = weights[i, e, s] / weights[:, e, s].sum()
                    else:
                        share = 1 / len(real)
                    slot += share * image[n]
                hidden = slot @ w_in[e] + b_in[e]
                hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
                result = hidden @ w_out[e] + b_out[e]
                for i, n in enumerate(real):
                    if router == "identity":
                        share = float(n == e * S + s)
                    elif router == "uniform_soft":
                        share = weights[i, e, s] / weights[i].sum()
                    else:
                        share = 1 / (E * S)
                    out[b, n] += share * result
    return out


def layer_of(layer_class):
    torch.manual_seed(0)
    layer = layer_class(12, E, S, 20).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        if layer.router_scale is not None:
            layer.router_scale.fill_(4)
    return layer


@pytest.fixture
def tokens():
    return torch.randn(3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MASKS = {"none": [8, 8, 8], "some": [8, 5, 0]}


@pytest.mark.parametrize("lengths", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("num_tokens", [8, 6])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_layer_equals_a_loop_over_images_slots_and_tokens(router, num_tokens, lengths, tokens):
    layer, tokens = layer_of(ROUTERS[router]), tokens[:, :num_tokens]
    mask = torch.arange(num_tokens) < torch.tensor(lengths)[:, None]
    expected = slot_by_slot(tokens.numpy(), mask.numpy(), layer, router)
    np.testing.assert_allclose(layer(tokens, mask).detach().numpy(), expected, atol=1e-12)
    if mask.all():
        np.testing.assert_allclose(layer(tokens).detach().numpy(), expected, atol=1e-12)


class SendsTokensRoundRobin(IdentityMoE):
    def route(self, tokens, mask=None):
        return Routing(*(w.flatten(2).unflatten(2, (S, E)).transpose(2, 3) for w in super().route(tokens, mask)))


class AveragesOverPadding(UniformMoE):
    def route(self, tokens, mask=None):
        routing = super().route(tokens, mask)
        return routing._replace(dispatch=super().route(tokens).dispatch * mask[..., None, None])


@pytest.mark.parametrize(
    ("mutant", "router"),
    [
        (SendsTokensRoundRobin, "identity"),
        (AveragesOverPadding, "uniform"),
        (UniformSoftMoE, "soft_uniform"),
        (SoftUniformMoE, "uniform_soft"),
    ],
)
def test_a_wrong_layer_is_caught(mutant, router, tokens):
    layer, mask = layer_of(mutant), torch.arange(8) < torch.tensor(MASKS["some"])[:, None]
    expected = slot_by_slot(tokens.numpy(), mask.numpy(), layer, router)
    assert np.abs(layer(tokens, mask).detach().numpy() - expected).max() > 0.01


def test_where_tokens_equal_slots_identity_is_the_identity(tokens):
    routing = IdentityMoE(12, E, S).route(tokens)
    for weights in routing:
        assert torch.equal(weights.flatten(2), torch.eye(8, dtype=weights.dtype).expand(3, 8, 8))


def test_identity_refuses_more_tokens_than_slots():
    with pytest.raises(ValueError, match="9 tokens and 8 slots: num_experts times slots_per_expert must be at least 9"):
        IdentityMoE(12, E, S)(torch.randn(1, 9, 12))


@pytest.mark.parametrize("layer_class", [UniformMoE, IdentityMoE])
def test_fixed_routing_learns_nothing_and_its_experts_start_apart(layer_class):
    torch.manual_seed(0)
    layer, alike = layer_class(64, E, S), SoftMoE(64, E, S)
    assert {name for name, _ in layer.named_parameters()} == {
        f"experts.{name}" for name in ("w_in", "b_in", "w_out", "b_out")
    }
    for ours, same in zip(layer.experts.parameters(), alike.experts.parameters(), strict=True):
        assert not any(torch.equal(ours[0], ours[i]) for i in range(1, E))
        assert ours.std().item() == pytest.approx(same[0].std().item(), rel=0.3)
    assert layer.experts.w_in[1].abs().max() <= (6 / (64 + 256)) ** 0.5


@pytest.mark.parametrize("router", ROUTERS)
def test_every_parameter_gets_a_gradient_and_the_layer_reports(router, tokens):
    layer = layer_of(ROUTERS[router])
    with collect_routing() as collected:
        layer(tokens).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    found = collected.means()["soft_moe"]
    assert ("router_scale" in found) == (router in ("soft_uniform", "uniform_soft"))
    if router in ("uniform", "uniform_soft"):
        assert found["dispatch_entropy"] == pytest.approx(1)
    if router in ("uniform", "soft_uniform"):
        assert found["combine_entropy"] == pytest.approx(1)
