"""The Soft MoE layer against numbers of the reference implementation; mutants of it must fail the same check."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from softmoe_clip.moe.experts import Experts
from softmoe_clip.moe.soft import Routing, SoftMoE, inverse_norm

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("soft_*.npz"))
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
PARAMETERS = {
    "Router/mu": "slot_embed",
    "Router/scale": "router_scale",
    "Mlp/Dense_0/kernel": "experts.w_in",
    "Mlp/Dense_0/bias": "experts.b_in",
    "Mlp/Dense_1/kernel": "experts.w_out",
    "Mlp/Dense_1/bias": "experts.b_out",
}


def layer_of(case, layer_class=SoftMoE, dtype=torch.float64):
    d, e, s = case["param:Router/mu"].shape
    layer = layer_class(
        d, e, s, case["param:Mlp/Dense_0/kernel"].shape[-1], json.loads(str(case["meta"]))["normalize"]
    ).to(dtype)
    state = {ours: torch.from_numpy(case[f"param:{theirs}"]) for theirs, ours in PARAMETERS.items()}
    layer.load_state_dict(state)
    return layer


def errors(case, layer, dtype):
    """Largest |difference| / max(1, max |reference|) of every output and gradient."""
    x = torch.from_numpy(case["x"]).to(dtype).requires_grad_()
    y, routing = layer(x), layer.route(x)
    (y * torch.from_numpy(case["loss_cotangent"]).to(dtype)).sum().backward()
    ours = {"y": y, "dispatch": routing.dispatch, "combine": routing.combine, "grad_x": x.grad}
    ours |= {f"grad:{theirs}": layer.get_parameter(name).grad for theirs, name in PARAMETERS.items()}
    return {name: error(case[name], value) for name, value in ours.items()}


def error(reference, ours):
    difference = np.abs(reference - ours.detach().double().numpy()).max()
    return difference / max(1.0, np.abs(reference).max())


def test_all_reference_cases_are_there():
    assert len(CASES) == 6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_outputs_routing_and_gradients_equal_the_reference(path, dtype):
    case = np.load(path)
    found = errors(case, layer_of(case, dtype=dtype), dtype)
    assert max(found.values()) <= TOLERANCE[dtype], found


def test_the_slots_that_reach_the_experts_equal_the_reference():
    case = np.load(GOLDEN / "soft_e_vitlike.npz")
    layer, seen = layer_of(case), []
    layer.experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer(torch.from_numpy(case["x"]))
    slots = seen[0].transpose(0, 1).flatten(1, 2)  # the reference: (experts, images * slots, width)
    assert error(case["expert_inputs"], slots) <= 1e-10


class DispatchesNormalisedTokens(SoftMoE):
    def forward(self, tokens, mask=None):
        routing = self.route(tokens, mask)
        slots = torch.einsum("bnes,bnd->besd", routing.dispatch, tokens * inverse_norm(tokens, -1))
        return torch.einsum("bnes,besd->bnd", routing.combine, self.experts(slots))


class DispatchesOverSlots(SoftMoE):
    def route(self, tokens, mask=None):
        weights = super().route(tokens, mask).combine
        return Routing(weights, weights)


class CombinesOverTokens(SoftMoE):
    def route(self, tokens, mask=None):
        weights = super().route(tokens, mask).dispatch
        return Routing(weights, weights)


class CombinesPerExpert(SoftMoE):
    def route(self, tokens, mask=None):
        dispatch = super().route(tokens, mask).dispatch
        return Routing(dispatch, self.logits(tokens).unflatten(2, self.slot_embed.shape[1:]).softmax(2))


class ForgetsTheScale(SoftMoE):
    def logits(self, tokens):
        return super().logits(tokens) / self.router_scale.detach()


class PutsEpsilonOutsideTheRoot(SoftMoE):
    def logits(self, tokens):
        slots = self.slot_embed.flatten(1)
        slots = slots / (slots.norm(dim=0) + 1e-6) * self.router_scale
        return tokens / (tokens.norm(dim=-1, keepdim=True) + 1e-6) @ slots


class InterleavesSlots(SoftMoE):
    def route(self, tokens, mask=None):
        e, s = self.slot_embed.shape[1:]
        return Routing(*(w.flatten(2).unflatten(2, (s, e)).transpose(2, 3) for w in super().route(tokens, mask)))


class ErfGelu(Experts):
    def forward(self, slots):
        hidden = F.gelu(torch.einsum("besd,edf->besf", slots, self.w_in) + self.b_in[:, None])
        return torch.einsum("besf,efd->besd", hidden, self.w_out) + self.b_out[:, None]


class OtherGelu(SoftMoE):
    def __init__(self, width, num_experts, slots_per_expert, hidden, normalize):
        super().__init__(width, num_experts, slots_per_expert, hidden, normalize)
        self.experts = ErfGelu(num_experts, width, hidden)


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (DispatchesNormalisedTokens, "soft_a"),
        (DispatchesOverSlots, "soft_a"),
        (CombinesOverTokens, "soft_a"),
        (CombinesPerExpert, "soft_a"),
        (InterleavesSlots, "soft_a"),
        (OtherGelu, "soft_a"),
        (ForgetsTheScale, "soft_e_vitlike"),
        (PutsEpsilonOutsideTheRoot, "soft_f_eps_zero_token_zero_slot"),
    ],
)
def test_a_wrong_layer_is_caught(mutant, name):
    case = np.load(GOLDEN / f"{name}.npz")
    for dtype, tolerance in TOLERANCE.items():
        assert max(errors(case, layer_of(case, mutant, dtype), dtype).values()) > 5 * tolerance


STATISTICS = json.loads((GOLDEN / "init_stats.json").read_text())


@pytest.mark.parametrize("sizes", STATISTICS)
def test_initialisation_has_the_statistics_of_the_reference(sizes):
    d, e, s, f = (int(part.lstrip("dnph")) for part in sizes.split("_"))
    torch.manual_seed(0)
    layer = SoftMoE(d, e, s, f)
    for theirs, ours in PARAMETERS.items():
        values, expected = layer.get_parameter(ours).detach(), STATISTICS[sizes][theirs]
        assert list(values.shape) == expected["shape"]
        if ours == "router_scale":
            assert values == 1
            continue
        if ours != "slot_embed":
            values = values[0]  # all experts are alike
        # Two estimates of one spread, 5 sigma apart at most.
        assert values.std().item() == pytest.approx(expected["std"], rel=5 / values.numel() ** 0.5)
        if "bias" not in theirs:
            assert values.abs().max().item() == pytest.approx(expected["absmax"], rel=0.03)
    assert layer.slot_embed.norm(dim=0).mean().item() == pytest.approx(
        STATISTICS[sizes]["mu_column_norm_mean"], rel=0.03
    )
    assert layer.slot_embed.abs().max() <= STATISTICS[sizes]["expected"]["mu_trunc_bound"] * (1 + 1e-6)
    assert layer.experts.w_in.abs().max() <= STATISTICS[sizes]["expected"]["xavier_bound_dense0"] * (1 + 1e-6)


def test_all_experts_start_alike_and_are_separate_parameters():
    experts = Experts(4, 6, 8)
    for parameter in experts.parameters():
        assert (parameter == parameter[:1]).all()
        assert parameter.is_contiguous()
    with torch.no_grad():
        experts.w_in[0] += 1
    assert not torch.equal(experts.w_in[0], experts.w_in[1])
