"""`train --plan`: what a run costs, in each of its processes."""

import json
import re

import pytest
from sharded_processes import look

from softmoe_clip.moe.expert_parallel import ExpertGroup
from softmoe_clip.training.build import build
from softmoe_clip.training.loop import train
from softmoe_clip.training.plan import print_plan
from softmoe_clip.training.shares import largest_shares, sharings

MIB = 2**20


@pytest.fixture
def plan(tiny_config, capsys):
    """Return the rows of the plan of the tiny run."""

    def read(*overrides):
        print_plan(tiny_config(*overrides))
        return rows(capsys.readouterr().out)

    return read


def rows(table):
    return {name.strip(): value for name, value in re.findall(r"│ (.+?) +│ +(.+?) │", table)}


def counts(config):
    """Count all parameters of a run's model, and those of its experts."""
    numbers = {name: p.numel() for name, p in build(config).model.named_parameters()}
    return sum(numbers.values()), sum(number for name, number in numbers.items() if ".experts." in name)


def test_a_process_is_told_what_it_keeps_where_it_has_all(plan, tiny_config):
    everything, _ = counts(tiny_config())
    found = plan()
    assert found["weights, gradients, AdamW"] == f"{16 * everything / MIB:.1f} MiB"
    assert found["all, trained"] == f"{everything:,}, {everything:,}"
    assert not any(name.startswith("in each") for name in found)
    assert plan("ema={}", "optim.name=lion")["weights, gradients, averages"] == f"{12 * everything / MIB:.1f} MiB"


def test_frozen_weights_take_memory_too(plan, tiny_config):
    model = build(tiny_config("freeze=['^visual']")).model
    frozen, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad == is_trained) for is_trained in (0, 1)
    )
    assert plan("freeze=['^visual']")["weights, gradients, AdamW"] == f"{(4 * frozen + 16 * trained) / MIB:.1f} MiB"


def test_one_process_plans_experts_that_will_be_spread(plan, tiny_config):
    everything, experts = counts(tiny_config())
    found = plan("expert_parallel=4")
    assert found["weights, gradients, AdamW"] == f"{16 * everything / MIB:.1f} MiB"
    held = 16 * (everything - experts + experts // 4)
    assert found["in each process, experts over 4"] == f"{held / MIB:.1f} MiB"


def test_a_plan_refuses_experts_that_training_would_not_spread(tiny_config):
    with pytest.raises(ValueError, match="expert_parallel 3 cannot share 4 experts out equally"):
        print_plan(tiny_config("expert_parallel=3"))
    with pytest.raises(ValueError, match="expert_parallel is 2, but the model has no experts"):
        print_plan(tiny_config("expert_parallel=2", "model.image_moe=null"))


def test_what_a_process_will_hold_of_spread_experts_is_what_it_holds(tiny_config):
    config = tiny_config("expert_parallel=2")
    share = build(config, ExpertGroup(None, 0, 2)).model
    held = {name: parameter.numel() for name, parameter in share.named_parameters()}
    assert largest_shares(build(config).model, config, 2) == held
    assert largest_shares(share, config, 6) == held
    assert sum(largest_shares(share, config, 1).values()) == counts(config)[0]


def test_a_sharded_run_is_planned_for_several_numbers_of_processes(plan, tiny_config):
    config = tiny_config("sharding=full")
    assert [*sharings(config, 1).values()] == [2, 8, 64]
    assert sharings(config, 3) == {"in each of 3 processes": 3}
    everything, _ = counts(config)
    held = {number: sum(largest_shares(build(config).model, config, number).values()) for number in (2, 8, 64)}
    assert everything / 2 < held[2] < 1.01 * everything / 2
    found = plan("sharding=full")
    assert {number: found[f"in each of {number} processes"] for number in held} == {
        number: f"{16 * parameters / MIB:.1f} MiB" for number, parameters in held.items()
    }


def test_more_processes_than_experts_do_not_cut_an_expert(tiny_config):
    config = tiny_config("sharding=full")
    model = build(config).model
    name = "visual.transformer.resblocks.1.mlp.experts.w_in"
    numbers = [largest_shares(model, config, number)[name] for number in (1, 3, 4, 64)]
    assert numbers == [4 * 32 * 128, 2 * 32 * 128, 32 * 128, 32 * 128]


def test_open_clips_own_model_whose_text_tower_is_no_module_is_planned(plan, architecture_file, tmp_path):
    architecture = json.loads(architecture_file.read_text()) | {"custom_text": False}
    text = ("context_length", "vocab_size", "width", "heads", "layers")
    architecture["text_cfg"] = {name: architecture["text_cfg"][name] for name in text}
    file = tmp_path / "native.json"
    file.write_text(json.dumps(architecture))
    custom, native = plan(), plan(f"model.arch={file}")
    assert native["text tower, parameters"] == custom["text tower, parameters"]
    assert native["forward GFLOP per pair"] == custom["forward GFLOP per pair"]
    assert plan(f"model.arch={file}", "sharding=full")["in each of 2 processes"]


def test_a_branch_is_planned_from_where_it_leaves_its_trunk(plan, tiny_config):
    trunk = train(tiny_config("steps=2"))
    found = plan(f"init={trunk}/checkpoints/step_00000002", "steps=1002")
    assert found["steps x batch"] == "1,000 x 8"
    with pytest.raises(ValueError, match="has 2 steps behind it"):
        plan(f"init={trunk}/checkpoints/step_00000002", "steps=2")


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["sharding=full", "expert_parallel=2"])
def test_several_processes_plan_together_and_one_of_them_says_it(tiny_yaml, tmp_path, plan, sharing):
    first, second = (told["said"] for told in look(2, tmp_path, "plan", str(tiny_yaml), sharing))
    assert second == ""
    assert "2 process(es) on cpu" in first
    first = rows(first)
    alone = plan(sharing)
    same = ("all, trained", "weights, gradients, AdamW", "in each of 2 processes", "in each process, experts over 2")
    assert [first.get(name) for name in same] == [alone.get(name) for name in same]
