"""Routers that balance by construction: their definitions as loops, balance, determinism."""

import numpy as np
import pytest
import torch
from assignment_oracle import by_scipy

from softmoe_clip.moe import collect_routing
from softmoe_clip.moe.assignment import BaseMoE, HashMoE, SinkhornMoE, hashed_experts, transport_plan


def mlp(token, expert, layer):
    w_in, b_in, w_out, b_out = (p.detach().double().numpy()[expert] for p in layer.experts.parameters())
    hidden = token @ w_in + b_in
    return 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3))) @ w_out + b_out


def apart(layer):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.5)
    return layer.double()


@pytest.fixture
def tokens():
    return torch.randn(2, 14, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_position_goes_to_its_expert_with_weight_one_whatever_the_token(tokens):
    layer = apart(HashMoE(6, 4, hidden=5))
    order = sorted(range(14), key=lambda i: i * 2654435761 % 2**32)
    expert = {position: place % 4 for place, position in enumerate(order)}
    expected = [[mlp(image[i].numpy(), expert[i], layer) for i in range(14)] for image in tokens]
    np.testing.assert_allclose(layer(tokens).detach(), np.array(expected), atol=1e-12)
    assert torch.equal(layer.route(tokens).dispatch, layer.route(-tokens).dispatch)


def test_hashing_learns_nothing_drops_nothing_and_is_balanced(tokens):
    layer = apart(HashMoE(6, 4, hidden=5))
    assert all(name.startswith("experts.") for name, _ in layer.named_parameters())
    with collect_routing() as collected:
        layer(tokens).square().sum().backward()
    assert collected.means()["HashMoE"]["dropped"] == 0
    assert collected.aux_loss() == 0
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    for m, e in ((196, 128), (197, 32), (16, 16), (5, 8)):
        counts = torch.bincount(hashed_experts(m, e, torch.device("cpu")), minlength=e)
        assert counts.max() - counts.min() <= 1
        assert counts.sum() == m


def sinkhorn_by_loops(gates, steps=2000):
    """Scale rows to 1 and columns to m / e, in turn, until nothing moves."""
    plan = np.array(gates, dtype=np.float64)
    m, e = plan.shape
    for _ in range(steps):
        for n in range(m):
            plan[n] /= plan[n].sum()
        for x in range(e):
            plan[:, x] *= m / e / plan[:, x].sum()
    return plan


def test_the_plan_is_the_balanced_one_of_the_gates(tokens):
    gates = (tokens @ torch.randn(6, 4, dtype=torch.float64)).softmax(2)
    plan = transport_plan(gates)
    expected = np.stack([sinkhorn_by_loops(group.numpy(), 300) for group in gates])
    np.testing.assert_allclose(plan, expected, atol=0.02)
    torch.testing.assert_close(plan.sum(1), torch.full((2, 4), 3.5, dtype=torch.float64))


def test_tokens_follow_the_plan_and_are_weighted_by_their_gates(tokens):
    layer = apart(SinkhornMoE(6, 4, capacity_factor=2.0, hidden=5))
    gates = (tokens @ layer.gate).softmax(2).detach().numpy()
    expected = np.zeros((2, 14, 6))
    for b in range(2):
        plan, taken = sinkhorn_by_loops(gates[b], 30), [0] * 4
        for n in range(14):
            expert = int(plan[n].argmax())
            if taken[expert] < 8:
                expected[b, n] = gates[b, n, expert] * mlp(tokens[b, n].numpy(), expert, layer)
                taken[expert] += 1
    np.testing.assert_allclose(layer(tokens).detach(), expected, atol=1e-10)
    assert torch.equal(layer.route(tokens).dispatch, layer.route(tokens).dispatch)


def test_sinkhorn_balances_where_the_gates_want_one_expert():
    torch.manual_seed(0)
    layer = SinkhornMoE(16, 8, capacity_factor=8.0)
    torch.nn.init.normal_(layer.gate)
    tokens = torch.randn(4, 128, 16) + 2 * layer.gate[:, 3].detach()  # everybody's favourite
    firsts = layer.logits(tokens).argmax(2)
    assert (firsts == 3).float().mean() > 0.9
    loads = layer.route(tokens).dispatch.sum((1, 3))
    assert loads.max() < 2.5 * 128 / 8


def test_base_layers_weigh_the_experts_of_the_best_balanced_assignment_by_sigmoids(tokens):
    layer = apart(BaseMoE(6, 4, hidden=5))
    scores = (tokens @ layer.gate).detach().numpy()
    expected = np.zeros((2, 14, 6))
    for b in range(2):
        for n, expert in enumerate(by_scipy(scores[b])):
            expected[b, n] = mlp(tokens[b, n].numpy(), expert, layer) / (1 + np.exp(-scores[b, n, expert]))
    np.testing.assert_allclose(layer(tokens).detach(), expected, atol=1e-10)
    assert not np.allclose(scores.argmax(2), [by_scipy(group) for group in scores])


def test_base_layers_are_balanced_drop_nothing_and_learn_gate_and_experts(tokens):
    layer = apart(BaseMoE(6, 4, hidden=5))
    with collect_routing() as collected:
        layer(tokens).square().sum().backward()
    statistics = collected.means()["BaseMoE"]
    assert statistics["dropped"] == 0
    assert statistics["filled"] == 14 / 16
    assert layer.route(tokens).dispatch.sum((1, 3)).sort(1).values.tolist() == [[3, 3, 4, 4]] * 2
    assert collected.aux_loss() == 0
    for parameter in layer.parameters():
        assert parameter.grad.isfinite().all()
        experts = parameter.grad.T if parameter is layer.gate else parameter.grad
        assert experts.flatten(1).abs().amax(1).min() > 0  # each of them


def test_an_image_in_a_base_layer_depends_on_its_group_alone_in_training_as_in_evaluation(tokens):
    layer = apart(BaseMoE(6, 4, hidden=5))
    together = layer(tokens)
    assert torch.equal(layer.eval()(tokens), together)
    torch.testing.assert_close(torch.cat([layer(image[None]) for image in tokens]), together)
    layer.group_size = 2
    assert layer.route(tokens).dispatch.sum((1, 3)).tolist() == [[7, 7, 7, 7]]
    assert not torch.allclose(layer(tokens), together)
    torch.testing.assert_close(layer(tokens[:1]), together[:1])  # an image alone is a group


def test_constant_tokens_do_not_keep_a_base_layer_busy():
    layer = BaseMoE(6, 4)
    assert layer.route(torch.ones(2, 12, 6)).dispatch.sum((1, 3)).tolist() == [[3, 3, 3, 3]] * 2
    assert layer.route(torch.full((2, 12, 6), torch.nan)).dispatch.sum((1, 3)).tolist() == [[3, 3, 3, 3]] * 2


def test_a_tower_of_base_layers_is_counted_on_the_meta_device_as_any_with_as_many_slots():
    from open_clip.transformer import VisionTransformer

    from softmoe_clip.config import MoEConfig
    from softmoe_clip.models.complexity import image_complexity
    from softmoe_clip.moe import install

    counts = []
    for router in ({"router": "base"}, {"router": "experts_choice", "capacity_multiple_of": 1}):
        with torch.device("meta"):
            tower = VisionTransformer(32, 8, width=24, layers=2, heads=2, mlp_ratio=2.0, output_dim=16)
            install(tower, MoEConfig(num_experts=4, **router))
        counts.append(image_complexity(tower, 32))
    assert counts[0][:2] == counts[1][:2]
