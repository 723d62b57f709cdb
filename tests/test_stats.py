"""The collector: auxiliary losses counted once, whatever recomputes, compiles or runs in parts."""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from softmoe_clip.moe import ExpertsChoiceMoE, SoftMoE, TokensChoiceMoE, collect_routing

WEIGHTS = {"importance": 0.5, "load": 0.25, "gshard": 2.0}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    layer = TokensChoiceMoE(8, 4, 2, 0.5, "round", 1, bpr=True, noise_std=1.0, hidden=6).double()
    layer.aux_weights = dict(WEIGHTS)
    torch.nn.init.normal_(layer.gate)
    return layer


@pytest.fixture
def tokens():
    return torch.randn(4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded(layer, tokens):
    torch.manual_seed(5)
    return layer(tokens)


def test_the_loss_is_the_weighted_sum_of_each_losss_mean_over_groups(layer, tokens):
    with collect_routing() as collected:
        seeded(layer, tokens)
    torch.manual_seed(5)
    losses = layer.route(tokens).aux_losses
    assert losses.keys() == WEIGHTS.keys()
    expected = sum(weight * losses[name].mean() for name, weight in WEIGHTS.items())
    torch.testing.assert_close(collected.aux_loss(), expected)
    found = collected.means()["TokensChoiceMoE"]
    assert {name: found[f"{name}_loss"] for name in losses} == pytest.approx(
        {name: loss.mean().item() for name, loss in losses.items()}, rel=1e-5
    )


def test_layers_add_up_and_parts_of_a_batch_are_averaged_over_groups(layer, tokens):
    layer.eval()
    with collect_routing() as whole:
        layer(tokens)
    with collect_routing() as parts:
        layer(tokens[:3])
        layer(tokens[3:])
    torch.testing.assert_close(parts.aux_loss(), whole.aux_loss())
    with collect_routing() as twice:
        layer(tokens)
        layer.label = "another layer"
        layer(tokens)
    torch.testing.assert_close(twice.aux_loss(), 2 * whole.aux_loss())


def test_processes_average_their_parts_and_experts_are_dead_in_all_together(layer, tokens):
    layer.noise_std = 0.0
    sent = []
    with collect_routing() as whole:
        layer(tokens)
    for part in tokens.chunk(2):
        with collect_routing() as collected:
            layer(part)
        found = collected.means(lambda mine: sent.append(mine) or sum(sent) / len(sent))
    assert found == {name: pytest.approx(values) for name, values in whole.means().items()}


def test_a_collector_without_statistics_has_the_losses_alone(layer, tokens):
    with collect_routing(statistics=False) as collected:
        layer(tokens)
        SoftMoE(8, 4)(tokens.float())
    assert collected.reports == {}
    assert collected.aux_loss() > 0
    with collect_routing() as none:
        ExpertsChoiceMoE(8, 4).double()(tokens)
    assert none.aux_loss() == 0
    assert none.losses == {}


@pytest.mark.parametrize("closed_before_backward", [True, False])
def test_recomputed_calls_neither_count_nor_change_a_gradient(layer, tokens, closed_before_backward):
    gradients, losses, counts = [], [], []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        x = tokens.clone().requires_grad_()
        with collect_routing() as collected:
            total = seeded(run, x).square().sum() + (aux := collected.aux_loss())
            if not closed_before_backward:
                total.backward()
        if closed_before_backward:
            total.backward()
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
        losses.append([aux, collected.aux_loss()])
        counts.append((len(collected.losses["TokensChoiceMoE"]), len(collected.reports["TokensChoiceMoE"])))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*losses)
    assert losses[1][0] == losses[1][1]
    assert counts == [(1, 1), (1, 1)]


def test_the_auxiliary_loss_alone_reaches_the_gate_through_a_checkpoint(layer, tokens):
    with collect_routing() as collected:
        seeded(lambda x: checkpoint(layer, x, use_reentrant=False), tokens)
    collected.aux_loss().backward()
    assert layer.gate.grad.abs().sum() > 0
    assert layer.experts.w_in.grad is None


def test_statistics_of_a_sparse_layer_are_those_of_its_masks_and_clean_gates(layer, tokens):
    with collect_routing() as collected:
        seeded(layer, tokens)
    found = collected.means()["TokensChoiceMoE"]
    torch.manual_seed(5)
    dispatch, gates = layer.route(tokens).dispatch.double(), (tokens @ layer.gate).softmax(2)
    loads = dispatch.sum((1, 3))
    expected = {
        "dropped": (dispatch.sum((2, 3)) == 0).double().mean(),
        "filled": dispatch.sum(1).mean(),
        "load_max": (loads.amax(1) / loads.mean(1)).mean(),
        "load_min": (loads.amin(1) / loads.mean(1)).mean(),
        "gate_entropy": -(gates * gates.log()).sum(2).mean() / torch.tensor(4.0).log(),
        "gate_max": gates.amax(2).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(
        {k: v.item() for k, v in expected.items()}, rel=1e-5
    )
    assert 0 < found["dropped"] < 1


COMPILED = """
import torch
from softmoe_clip.moe import ExpertsChoiceMoE, TokensChoiceMoE, collect_routing
from softmoe_clip.moe.ablations import IdentityMoE, SoftUniformMoE, UniformMoE, UniformSoftMoE
from softmoe_clip.moe.assignment import BaseMoE

torch.manual_seed(0)
tokens = torch.randn(2, 8, 16)
sparse = [TokensChoiceMoE(16, 4, 2, bpr=True), ExpertsChoiceMoE(16, 4), BaseMoE(16, 4)]
soft = [kind(16, 4, 2) for kind in (IdentityMoE, SoftUniformMoE, UniformMoE, UniformSoftMoE)]
for layer in sparse + soft:
    layer.aux_weights = {"importance": 1.0, "gshard": 1.0}
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # the graph is what matters
    results = []
    for run in (layer, compiled):
        with collect_routing() as collected:
            out = run(tokens)
        (out.square().sum() + collected.aux_loss()).backward()
        assert sum(map(len, collected.reports.values())) == 1
        results.append([out, collected.aux_loss(), *(p.grad for p in layer.parameters())])
        layer.zero_grad(set_to_none=True)
    torch.testing.assert_close(*results)
    torch.export.export(layer.eval(), (tokens,))
"""


@pytest.mark.slow
def test_compiled_layers_equal_the_plain_ones_and_report_their_losses():
    # In a process of its own: the shape checks that the tests switch on cannot be compiled.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
