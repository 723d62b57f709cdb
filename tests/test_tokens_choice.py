"""Tokens Choice against numbers of the reference, a slow oracle, and mutants that both must catch."""

import math

import numpy as np
import pytest
import torch
from golden_sparse import GOLDEN, PARAMETERS, TOLERANCE, error, golden_layer, router_of

from softmoe_clip.moe import SparseRouting, TokensChoiceMoE, collect_routing
from softmoe_clip.moe.capacity import slots_per_group
from softmoe_clip.moe.tokens_choice import squared_variation

CASES = sorted(GOLDEN.glob("tc_*.npz"))


def layer_of(case, layer_class=TokensChoiceMoE, dtype=torch.float64):
    router = router_of(case)
    settings = {"top_k": router["num_selected_experts"], "bpr": router["dispatcher"]["batch_priority"]}
    layer = golden_layer(case, layer_class, dtype, **settings)
    layer.aux_weights = {name: router[f"{name}_loss_weight"] for name in ("importance", "load", "gshard")}
    return layer


def errors(case, layer, dtype):
    """Largest |difference| / max(1, max |reference|) of every output, loss and gradient; masks must be equal."""
    x = torch.from_numpy(case["x"]).to(dtype).requires_grad_()
    with collect_routing() as collected:
        y = layer(x)
    routing = layer.route(x)
    parameters = [layer.get_parameter(name) for name in PARAMETERS.values()]
    r = torch.from_numpy(case["loss_cotangent"]).to(dtype)
    grad_x, *gradients = torch.autograd.grad((y * r).sum(), [x, *parameters], retain_graph=True)
    ours = {"y": y, "dispatch": routing.dispatch, "combine": routing.combine, "grad_x": grad_x}
    ours |= {f"grad:{theirs}": gradient for theirs, gradient in zip(PARAMETERS, gradients, strict=True)}
    ours |= {f"metric:{name}_loss": loss for name, loss in routing.aux_losses.items()}
    if "gradaux:Router/dense/kernel" in case:
        ours["gradaux:Router/dense/kernel"] = torch.autograd.grad(collected.aux_loss(), layer.gate)[0]
    assert {name for name in case if name.startswith("metric:")} <= {*ours, "metric:auxiliary_loss"}
    found = {name: error(case[name], value) for name, value in ours.items()}
    found["dispatch"] = 0.0 if np.array_equal(case["dispatch"], routing.dispatch.numpy()) else np.inf
    return found


def test_all_reference_cases_are_there():
    assert len(CASES) == 4


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_masks_outputs_losses_and_gradients_equal_the_reference(path, dtype):
    case = np.load(path)
    found = errors(case, layer_of(case, dtype=dtype), dtype)
    assert max(found.values()) <= TOLERANCE[dtype], found


def test_the_slots_that_reach_the_experts_equal_the_reference_empty_ones_too():
    case = np.load(GOLDEN / "tc_a_k1.npz")
    layer, seen = layer_of(case), []
    layer.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(torch.from_numpy(case["x"]))
    assert not case["dispatch"].any(1).all()
    assert error(case["expert_inputs"], seen[0].transpose(0, 1).flatten(1, 2)) == 0


class ForgetsPriority(TokensChoiceMoE):
    def choose(self, gates, num_slots):
        self.bpr = not self.bpr
        try:
            return super().choose(gates, num_slots)
        finally:
            self.bpr = not self.bpr


class PlacesTokenByToken(TokensChoiceMoE):
    """All choices of a token before those of the next one."""

    def choose(self, gates, num_slots):
        return torch.stack([one_by_one(group, self.top_k, num_slots, False, by_token=True) for group in gates])


class RenormalisesGates(TokensChoiceMoE):
    def route(self, tokens, noise=None):
        routing = super().route(tokens, noise)
        total = routing.combine.sum((2, 3), keepdim=True).clamp(min=1e-9)
        return routing._replace(combine=routing.combine / total)


class CountsCapacityWithoutChoices(TokensChoiceMoE):
    def num_slots(self, num_tokens):
        return super().num_slots(num_tokens) // self.top_k


class NoiseIsNotDividedByExperts(TokensChoiceMoE):
    def route(self, tokens, noise=None):
        return super().route(tokens, None if noise is None else noise * self.gate.shape[1])


class LosesFromNoisyGates(TokensChoiceMoE):
    def aux_losses(self, logits, noisy):
        return super().aux_losses(logits, noisy) | {"importance": squared_variation(noisy.softmax(2).sum(1))}


class UsesTheSampleVariance(TokensChoiceMoE):
    def aux_losses(self, logits, noisy):
        e = logits.shape[2]
        return {name: loss * e / (e - 1) for name, loss in super().aux_losses(logits, noisy).items()}


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (ForgetsPriority, "tc_a_k1"),
        (ForgetsPriority, "tc_b_k1_bpr"),
        (PlacesTokenByToken, "tc_c_k2"),
        (RenormalisesGates, "tc_c_k2"),
        (CountsCapacityWithoutChoices, "tc_c_k2"),
        (NoiseIsNotDividedByExperts, "tc_f_k1_noise"),
        (LosesFromNoisyGates, "tc_f_k1_noise"),
        (UsesTheSampleVariance, "tc_a_k1"),
    ],
)
def test_a_wrong_layer_is_caught(mutant, name):
    case = np.load(GOLDEN / f"{name}.npz")
    layer = layer_of(case, mutant)
    try:
        found = errors(case, layer, torch.float64)
    except ValueError:  # masks of another shape
        return
    assert max(found.values()) > 1e-6


def one_by_one(gates, top_k, num_slots, bpr, by_token=False):
    """Seat one choice after the other, in plain Python."""
    m, e = gates.shape
    tokens = sorted(range(m), key=lambda t: -max(gates[t].tolist())) if bpr else range(m)
    favourites = [sorted(range(e), key=lambda x: -gates[t, x].item()) for t in range(m)]
    queue = [(t, k) for t in tokens for k in range(top_k)] if by_token else None
    dispatch, taken = torch.zeros(m, e, num_slots, dtype=torch.bool), [0] * e
    for t, k in queue or [(t, k) for k in range(top_k) for t in tokens]:
        expert = favourites[t][k]
        if taken[expert] < num_slots:
            dispatch[t, expert, taken[expert]] = True
            taken[expert] += 1
    return dispatch


def different_experts(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def by_einsum(layer, tokens, routing):
    """The layer as dense products: dispatch, experts, combine."""
    slots = torch.einsum("gmes,gmd->gesd", routing.dispatch.to(tokens.dtype), tokens)
    return torch.einsum("gmes,gesd->gmd", routing.combine.to(tokens.dtype), layer.experts(slots))


@pytest.mark.parametrize("bpr", [False, True])
@pytest.mark.parametrize(("top_k", "capacity_factor"), [(1, 1.0), (2, 0.5), (3, 1.05), (4, 2.0)])
@pytest.mark.parametrize("ties", [False, True])
def test_slots_are_filled_as_one_by_one_and_the_layer_equals_the_einsum_form(bpr, top_k, capacity_factor, ties):
    torch.manual_seed(0)
    layer = TokensChoiceMoE(6, 5, top_k, capacity_factor, "round", 1, bpr, hidden=7).double().eval()
    different_experts(layer)
    if ties:
        torch.nn.init.zeros_(layer.gate)
    tokens = torch.randn(3, 11, 6, dtype=torch.float64, requires_grad=True)
    routing = layer.route(tokens)
    assert isinstance(routing, SparseRouting)
    gates = (tokens @ layer.gate).softmax(2)
    num_slots = round(capacity_factor * 11 * top_k / 5)
    expected = torch.stack([one_by_one(group, top_k, num_slots, bpr) for group in gates])
    assert torch.equal(routing.dispatch, expected)
    torch.testing.assert_close(routing.combine, expected * gates[..., None])
    outputs = layer(tokens), by_einsum(layer, tokens, routing)
    torch.testing.assert_close(*outputs)
    inputs, cotangent = [tokens, *layer.parameters()], torch.randn_like(tokens)
    gradients = [torch.autograd.grad((out * cotangent).sum(), inputs, retain_graph=True) for out in outputs]
    torch.testing.assert_close(*gradients)


def test_noise_is_drawn_in_training_only_and_from_torchs_seed():
    torch.manual_seed(0)
    layer, tokens = TokensChoiceMoE(6, 4, noise_std=1.0), torch.randn(2, 9, 6)
    torch.manual_seed(1)
    first, second = layer.route(tokens), layer.route(tokens)
    torch.manual_seed(1)
    again = layer.route(tokens)
    assert torch.equal(first.combine, again.combine)
    assert not torch.equal(first.combine, second.combine)
    assert "load" in first.aux_losses
    layer.eval()
    assert torch.equal(layer.route(tokens).combine, layer.route(tokens).combine)
    assert "load" not in layer.route(tokens).aux_losses
    given = layer.route(tokens, noise=torch.randn(2, 9, 4))
    assert not torch.equal(given.combine, layer.route(tokens).combine)
    assert "load" in given.aux_losses


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_load_loss_is_that_of_the_chances_to_be_among_the_first_k(top_k):
    """V-MoE's appendix A: the threshold is the k-th largest noisy logit, and an expert's own noise is drawn again."""
    torch.manual_seed(0)
    layer = TokensChoiceMoE(6, 4, top_k, noise_std=1.0).double()
    tokens, noise = torch.randn(1, 9, 6).double(), torch.randn(1, 9, 4).double()
    logits, std = (tokens @ layer.gate)[0].tolist(), 1.0 / 4
    loads = [0.0] * 4
    for token, drawn in zip(logits, noise[0].tolist(), strict=True):
        threshold = sorted((x + std * z for x, z in zip(token, drawn, strict=True)), reverse=True)[top_k - 1]
        for expert, logit in enumerate(token):
            loads[expert] += 0.5 * (1 + math.erf((logit - threshold) / std / math.sqrt(2)))
    expected = np.var(loads) / np.mean(loads) ** 2
    assert layer.route(tokens, noise).aux_losses["load"].item() == pytest.approx(expected, rel=1e-9)


def test_auxiliary_gradients_are_finite_and_zero_at_exactly_balanced_load():
    layer, tokens = TokensChoiceMoE(6, 4, noise_std=1.0), torch.randn(2, 8, 6)
    torch.nn.init.zeros_(layer.gate)
    losses = layer.route(tokens, noise=torch.zeros(2, 8, 4)).aux_losses
    assert losses["importance"].tolist() == [0, 0]
    assert losses["gshard"].tolist() == [1, 1]
    (gradient,) = torch.autograd.grad(losses["importance"].sum() + losses["load"].sum(), layer.gate)
    assert (gradient == 0).all()


def test_a_group_over_several_images_is_routed_as_one_long_image():
    torch.manual_seed(0)
    layer = different_experts(TokensChoiceMoE(6, 3, 1, 1.0, "round", 1, bpr=True, group_size=2, hidden=5).double())
    tokens = torch.randn(4, 7, 6, dtype=torch.float64)
    alone = TokensChoiceMoE(6, 3, 1, 1.0, "round", 1, bpr=True, hidden=5).double()
    alone.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(tokens), alone(tokens.view(2, 14, 6)).view(4, 7, 6))
    assert layer.route(tokens).dispatch.shape == (2, 14, 3, 5)
    assert not torch.allclose(layer(tokens), alone(tokens))


def test_a_batch_without_whole_groups_is_refused_in_training_and_cut_in_evaluation():
    layer = TokensChoiceMoE(6, 3, group_size=4)
    with pytest.raises(ValueError, match="6 images does not divide into routing groups of 4"):
        layer(torch.randn(6, 7, 6))
    layer.eval()
    assert layer.route(torch.randn(6, 7, 6)).dispatch.shape[:2] == (3, 14)
    assert layer(torch.randn(1, 7, 6)).shape == (1, 7, 6)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((196, 128, 1.0, "round", 1), 2),
        ((10, 4, 1.0, "round", 1), 2),  # 2.5, to the even number
        ((14, 4, 1.0, "round", 1), 4),  # 3.5
        ((10, 4, 1.0, "ceil", 1), 3),
        ((10, 4, 1.0, "ceil", 4), 4),
        ((24, 4, 1.05, "ceil", 4), 8),
        ((12, 4, 0.5, "round", 1), 2),  # 1.5
        ((1568, 32, 1.0, "round", 1), 49),
    ],
)
def test_capacity_is_rounded_and_raised_to_a_multiple(sizes, expected):
    assert slots_per_group(*sizes) == expected


def test_a_capacity_below_one_is_one_sentence():
    with pytest.raises(ValueError, match="less than one token each of 4"):
        TokensChoiceMoE(6, 16, capacity_rounding="round")(torch.randn(1, 4, 6))
    with pytest.raises(ValueError, match="top_k must be between 1 and the 4 experts, got 5"):
        TokensChoiceMoE(6, 4, top_k=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision_layers_route_in_float32(dtype):
    torch.manual_seed(0)
    layer, tokens = different_experts(TokensChoiceMoE(16, 4, 2)), torch.randn(2, 9, 16)
    with torch.autocast("cpu", dtype):
        routing, out = layer.route(tokens), layer(tokens)
    assert torch.equal(routing.combine, layer.route(tokens).combine)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), layer(tokens), atol=0.05, rtol=0.05)
    half = layer.to(dtype)
    assert half.route(tokens.to(dtype)).combine.dtype == torch.float32
    assert half(tokens.to(dtype)).dtype == dtype
