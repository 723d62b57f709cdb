"""Experts Choice against numbers of the reference, a slow oracle, and mutants that both must catch."""

import numpy as np
import pytest
import torch
from golden_sparse import GOLDEN, PARAMETERS, TOLERANCE, error, golden_layer

from softmoe_clip.moe import ExpertsChoiceMoE, SoftMoE, collect_routing

CASES = sorted(GOLDEN.glob("ec_*.npz"))


def layer_of(case, layer_class=ExpertsChoiceMoE, dtype=torch.float64):
    return golden_layer(case, layer_class, dtype)


def errors(case, layer, dtype):
    """Largest |difference| / max(1, max |reference|) of every output and gradient; masks must be equal."""
    x = torch.from_numpy(case["x"]).to(dtype).requires_grad_()
    y, routing = layer(x), layer.route(x)
    (y * torch.from_numpy(case["loss_cotangent"]).to(dtype)).sum().backward()
    ours = {"y": y, "combine": routing.combine, "grad_x": x.grad}
    gradients = {theirs: layer.get_parameter(name).grad for theirs, name in PARAMETERS.items()}
    ours |= {f"grad:{name}": torch.zeros(()) if gradient is None else gradient for name, gradient in gradients.items()}
    found = {name: error(case[name], value) for name, value in ours.items()}
    found["dispatch"] = 0.0 if np.array_equal(case["dispatch"], routing.dispatch.numpy()) else np.inf
    return found


def test_all_reference_cases_are_there():
    assert len(CASES) == 3


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_masks_outputs_and_gradients_equal_the_reference(path, dtype):
    case = np.load(path)
    found = errors(case, layer_of(case, dtype=dtype), dtype)
    assert max(found.values()) <= TOLERANCE[dtype], found


class GatesOverTokens(ExpertsChoiceMoE):
    def logits(self, tokens):
        return super().logits(tokens).softmax(1).log()


class TakesTheWorst(ExpertsChoiceMoE):
    def choose(self, gates, num_slots):
        return super().choose(-gates, num_slots)


class EveryWeightIsOne(ExpertsChoiceMoE):
    def route(self, tokens, noise=None):
        routing = super().route(tokens, noise)
        return routing._replace(combine=routing.dispatch.to(routing.combine.dtype))


class OrdersSlotsByToken(ExpertsChoiceMoE):
    def choose(self, gates, num_slots):
        tokens = gates.argsort(1, descending=True)[:, :num_slots].sort(1).values
        return torch.zeros(*gates.shape, num_slots, dtype=torch.bool).scatter(1, tokens.transpose(1, 2)[:, None], True)


@pytest.mark.parametrize("mutant", [GatesOverTokens, TakesTheWorst, EveryWeightIsOne, OrdersSlotsByToken])
def test_a_wrong_layer_is_caught(mutant):
    case = np.load(GOLDEN / "ec_a_cf1.npz")
    assert max(errors(case, layer_of(case, mutant), torch.float64).values()) > 1e-6


def token_by_token(tokens, layer, num_slots):
    """One image, one expert, one slot at a time, in NumPy float64."""
    gate, w_in, b_in, w_out, b_out = (p.detach().double().numpy() for p in layer.parameters())
    out = np.zeros_like(tokens)
    for b, image in enumerate(tokens):
        gates = np.exp(image @ gate)
        gates /= gates.sum(1, keepdims=True)
        for e in range(gate.shape[1]):
            for n in sorted(range(len(image)), key=lambda n: -gates[n, e])[:num_slots]:
                hidden = image[n] @ w_in[e] + b_in[e]
                hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
                out[b, n] += gates[n, e] * (hidden @ w_out[e] + b_out[e])
    return out


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = ExpertsChoiceMoE(6, 4, 1.0, "round", 1, hidden=7).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


@pytest.fixture
def tokens():
    return torch.randn(3, 10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_layer_equals_a_loop_over_images_experts_and_tokens(layer, tokens):
    np.testing.assert_allclose(layer(tokens).detach(), token_by_token(tokens.numpy(), layer, 2), atol=1e-12)


def test_at_equal_gates_earlier_tokens_are_taken_first(layer, tokens):
    torch.nn.init.zeros_(layer.gate)
    routing = layer.route(tokens)
    assert torch.equal(routing.dispatch, torch.eye(10, 2, dtype=torch.bool)[None, :, None].expand(3, 10, 4, 2))
    assert (routing.combine[routing.dispatch] == 0.25).all()


def test_every_slot_is_filled_and_a_token_left_out_gets_zeros(layer, tokens):
    routing, out = layer.route(tokens), layer(tokens)
    assert (routing.dispatch.sum(1) == 1).all()
    assert routing.aux_losses == {}
    left_out = ~routing.dispatch.flatten(2).any(2)
    assert left_out.any()
    assert (out[left_out] == 0).all()
    with collect_routing() as collected:
        layer(tokens)
    assert collected.aux_loss() == 0
    statistics = collected.means()["ExpertsChoiceMoE"]
    assert statistics["dropped"] == pytest.approx(left_out.double().mean().item())
    assert statistics["filled"] == statistics["load_max"] == statistics["load_min"] == 1


def test_more_slots_than_tokens_stay_empty(layer, tokens):
    layer.capacity = 8.0, "ceil", 4
    routing = layer.route(tokens)
    assert routing.dispatch.shape == (3, 10, 4, 20)
    assert torch.equal(routing.dispatch.any(1), (torch.arange(20) < 10).expand(3, 4, 20))
    gates = (tokens @ layer.gate).softmax(2)
    np.testing.assert_allclose(layer(tokens).detach(), token_by_token(tokens.numpy(), layer, 10), atol=1e-12)
    torch.testing.assert_close(routing.combine.sum(3), gates)


def test_a_group_over_several_images_is_routed_as_one_long_image(layer, tokens):
    layer.group_size = 3
    expected = token_by_token(tokens.view(1, 30, 6).numpy(), layer, 8)  # 7.5, to the even number
    np.testing.assert_allclose(layer(tokens).detach().view(1, 30, 6), expected, atol=1e-12)


def test_a_smaller_group_of_evaluation_gets_its_share_of_the_slots_rounded_up():
    layer = ExpertsChoiceMoE(6, 3, capacity_multiple_of=1, group_size=2).eval()
    assert layer.route(torch.randn(2, 4, 6)).dispatch.shape == (1, 8, 3, 3)  # 8 tokens for 3 experts: 2.67, rounded up
    assert layer.route(torch.randn(1, 4, 6)).dispatch.shape == (1, 4, 3, 2)  # half of 3


@pytest.mark.parametrize("layer", [SoftMoE, ExpertsChoiceMoE])
@pytest.mark.parametrize("sizes", [(0, 4), (12, 0), (12, -1)])
def test_layers_of_nothing_are_refused(layer, sizes):
    with pytest.raises(ValueError, match="count from 1, got"):
        layer(*sizes)
