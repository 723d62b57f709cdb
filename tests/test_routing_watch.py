"""A layer whose routing collapses is told once, one that never left its start is not, and controls never are."""

import json

import pytest
import torch

from softmoe_clip.config import ModelConfig
from softmoe_clip.moe import ExpertsChoiceMoE, SoftMoE, TokensChoiceMoE, collect_routing
from softmoe_clip.moe.ablations import IdentityMoE, UniformMoE
from softmoe_clip.moe.assignment import BaseMoE, HashMoE
from softmoe_clip.moe.stats import add_statistics
from softmoe_clip.training.loop import train
from softmoe_clip.training.routing_watch import RoutingWatch, watched_layers


def watch(warmup=0, lines=()):
    return RoutingWatch({"image/block_1", "image/block_3"}, warmup, lines)


def statistics(layer, tokens):
    """What a layer in the image tower would log."""
    layer.label = "image/block_3"
    with torch.no_grad(), collect_routing() as routing:
        layer(tokens)
    return routing.summary()


@pytest.fixture
def tokens():
    return torch.randn(6, 16, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def soft():
    torch.manual_seed(0)
    return SoftMoE(12, 4, 2)


def test_an_expert_is_dead_below_a_hundredth_of_an_even_share():
    with collect_routing() as collected:
        add_statistics("layer", {"usage": torch.tensor([0.995, 0.0026, 0.0024, 0.0])})  # a hundredth of 1 / 4: 0.0025
    assert collected.means() == {"layer": {"dead_experts": 0.5}}


def test_a_fresh_layer_is_silent_and_a_spread_of_slots_that_is_lost_is_told(soft, tokens):
    looking = watch()
    alike = tokens[:, :1] + 1e-3 * tokens  # tokens that are nearly the same: so are the slots, from the start
    for step in (1, 2, 3):
        assert looking.changes(step, statistics(soft, alike)) == []
    soft.router_scale.data.fill_(5)
    assert looking.changes(4, statistics(soft, tokens)) == []
    soft.router_scale.data.fill_(1e-4)
    [line] = looking.changes(5, statistics(soft, tokens))
    assert line.startswith("step 5: the routing of image/block_3 has collapsed: all slots take in the same (slot_sim")
    assert looking.changes(6, statistics(soft, tokens)) == []
    soft.router_scale.data.fill_(5)
    [line] = looking.changes(7, statistics(soft, tokens))
    assert line.startswith("step 7: the routing of image/block_3 is back: no longer all slots take in the same")


def test_weights_that_pick_one_token_and_one_slot_are_told_in_one_line(soft, tokens):
    soft.router_scale.data.fill_(1e4)
    [line] = watch().changes(1, statistics(soft, tokens))
    assert "each slot takes a single token (dispatch_max 1)" in line
    assert "each token listens to a single slot (combine_entropy " in line


def test_experts_that_no_token_listens_to_are_dead(soft, tokens):
    with torch.no_grad():
        direction = torch.ones(12)
        soft.slot_embed.copy_(-direction[:, None, None].expand(12, 4, 2))
        soft.slot_embed[:, 0] = direction[:, None]
        soft.router_scale.fill_(30)
    found = statistics(soft, tokens + 3)  # all tokens look where the first expert's slots look
    assert found["routing/image/block_3/dead_experts"] == 0.75
    [line] = watch().changes(1, found)
    assert "most experts are dead (dead_experts 0.75)" in line


def test_a_sparse_gate_that_sends_all_to_one_expert_is_told(tokens):
    torch.manual_seed(0)
    layer, looking = TokensChoiceMoE(12, 4, capacity_multiple_of=1), watch()
    assert looking.changes(1, statistics(layer, tokens)) == []
    with torch.no_grad():
        layer.gate.zero_()[:, 2] = 1.0
    found = statistics(layer, tokens.abs())
    assert found["routing/image/block_3/dead_experts"] == 0.75
    [line] = looking.changes(2, found)
    assert "most experts are dead (dead_experts 0.75), most tokens find no expert (dropped 0.75)" in line


def test_what_the_capacity_drops_by_itself_is_no_collapse(tokens):
    torch.manual_seed(0)
    layer = ExpertsChoiceMoE(12, 4, capacity_factor=0.25, capacity_multiple_of=1)
    looking = watch()
    found = statistics(layer, tokens)
    assert found["routing/image/block_3/dropped"] >= 0.75
    assert found["routing/image/block_3/dead_experts"] == 0
    assert looking.changes(1, found) == looking.changes(2, found) == []


COLLAPSED = {"routing/image/block_1/dispatch_max": 0.99}


def test_nothing_is_said_before_the_end_of_the_warmup():
    looking = watch(warmup=3)
    assert [bool(looking.changes(step, COLLAPSED)) for step in (1, 2, 3, 4, 5)] == [False, False, False, True, False]


def test_values_that_swing_about_the_threshold_are_told_once():
    looking = watch()
    swinging = [{"routing/image/block_1/dispatch_max": value} for value in (0.949, 0.951, 0.949, 0.951, 0.949)]
    assert [bool(looking.changes(step, line)) for step, line in enumerate(swinging)] == [
        False,
        True,
        False,
        False,
        False,
    ]


def test_a_run_that_goes_on_does_not_say_again_what_it_said():
    assert watch(lines=[{"step": 5, **COLLAPSED}]).changes(6, COLLAPSED) == []
    assert len(watch(lines=[{"step": 5, "val/loss": 2.0}]).changes(6, COLLAPSED)) == 1


def test_controls_and_a_lone_slot_are_not_watched():
    soft, sparse = (SoftMoE, UniformMoE, IdentityMoE), (TokensChoiceMoE, ExpertsChoiceMoE, HashMoE, BaseMoE)
    layers = [kind(12, 4) for kind in (*soft, *sparse)] + [SoftMoE(12, 1, 1), SoftMoE(12, 1, 2), TokensChoiceMoE(12, 1)]
    for number, layer in enumerate(layers):
        layer.label = f"image/block_{number}"
    found = watched_layers(torch.nn.ModuleList(layers))
    assert found == {f"image/block_{number}" for number in (0, 3, 4, 6, 8)}
    assert RoutingWatch(found, 0).changes(1, COLLAPSED) == []


def test_numbers_that_are_none_say_nothing():
    assert watch().changes(1, {"routing/image/block_1/combine_entropy": float("nan")}) == []
    watch(lines=[{"step": 1, "routing/image/block_1/combine_entropy": None}])  # as it then stands in metrics.jsonl


def test_slots_that_never_were_apart_have_not_collapsed():
    looking, name = watch(), "routing/image/block_1/slot_similarity"
    swinging = (0.999987, 0.999403, 0.999902, 0.999082, 0.999943)  # the reference's start, in the demo's towers
    assert [looking.changes(step, {name: value}) for step, value in enumerate(swinging, start=1)] == [[]] * 5


def test_layers_that_an_architecture_brings_along_are_watched_too():
    from softmoe_clip.models.create import create_model

    model = create_model(ModelConfig("SoftMoE-demo"), 100, 12, eos_id=2)
    assert watched_layers(model) == {"image/block_2", "image/block_3"}


def test_a_run_that_starts_as_usual_is_silent_and_one_with_a_wild_scale_warns_once(tiny_config, tmp_path, capsys):
    run = train(tiny_config())
    assert "routing of" not in capsys.readouterr().err
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0.9 < line["routing/image/block_1/slot_similarity"] < 1
    assert line["routing/image/block_1/dead_experts"] == 0

    def wild(layer, arguments):
        layer.router_scale.data.fill_(1e4)

    make = SoftMoE.__init__
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SoftMoE, "__init__", lambda self, *a, **k: (make(self, *a, **k), wild(self, a))[0])
        train(tiny_config("steps=5", f"out={tmp_path}/wild"))
    told = [line for line in capsys.readouterr().err.splitlines() if "routing of" in line]
    assert len(told) == 1
    assert told[0].startswith("step 3: the routing of image/block_1 has collapsed: each slot takes a single token")
