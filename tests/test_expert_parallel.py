"""Experts spread over processes: layers and runs give what one process gives, and checkpoints are whole."""

import json
from copy import deepcopy
from shutil import copytree

import pytest
import torch
from expert_processes import (
    CASES,
    LAYERS_ALONE,
    WHOLE_PROGRAM,
    fresh_layer,
    layer_process,
    run_processes,
    train_on,
)
from safetensors.torch import load_file, save_file
from torch import nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.moe.expert_parallel import ExpertGroup, SpreadExperts, own_share, spread_over, spread_parameters
from softmoe_clip.moe.install import new_layer
from softmoe_clip.training.build import build
from softmoe_clip.training.checkpoint import load_newest, save_checkpoint
from softmoe_clip.training.expert_parallel import check_spread, load_shares
from softmoe_clip.training.loop import Progress, train

MOE = "model.image_moe"
WEIGHTS = "model/open_clip_model.safetensors"
# A larger eps: Adam divides noise by itself where a gradient should be zero, as that of a key's bias.
SETTINGS = ("optim.eps=0.0001", "optim.schedule=constant", "steps=6")


def part(rank, size=2):
    """A place in a group whose processes are not there: enough to build, too little to compute."""
    return ExpertGroup(None, rank, size)


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layers_on_several_processes_compute_what_one_computes(tmp_path, num_processes):
    preload = LAYERS_ALONE if num_processes == 2 else WHOLE_PROGRAM
    run_processes(layer_process, num_processes, str(tmp_path), preload=preload)
    for rank in range(num_processes):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == {"size": num_processes, "caught": num_processes}


@pytest.mark.parametrize("router", CASES)
def test_a_share_starts_with_the_bits_of_the_whole_layer(router):
    whole = fresh_layer(router)
    after = torch.rand(1)
    for rank in range(2):
        share = fresh_layer(router, part(rank))
        assert torch.equal(torch.rand(1), after)  # what is drawn later is the same, too
        assert isinstance(share.experts, SpreadExperts)
        expected = own_share(whole.state_dict(), share)
        assert len(share.experts.w_in) == len(expected["experts.w_in"]) == 2
        assert share.state_dict().keys() == expected.keys()
        for name, weight in share.state_dict().items():
            assert torch.equal(weight, expected[name]), name


def test_the_full_set_of_experts_is_never_made():
    class Largest(torch.overrides.TorchFunctionMode):
        size = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                self.size = max(self.size, made.untyped_storage().nbytes() // made.element_size())
            return made

    for router in ("soft", "uniform"):
        with Largest() as seen, spread_over(part(1, 8)):
            new_layer(MoEConfig(router=router, layers=[0], num_experts=64), 32, 64)
        assert seen.size == 8 * 32 * 64


def test_a_model_with_spread_experts_can_be_copied():
    layer = nn.Sequential(fresh_layer("soft", part(1)))
    assert deepcopy(layer)[0].experts.group is layer[0].experts.group


def test_experts_that_cannot_be_shared_out_equally_are_refused():
    with pytest.raises(ValueError, match="expert_parallel 3 cannot share 4 experts out equally"):
        fresh_layer("soft", part(0, 3))


def test_a_launch_that_expert_parallel_does_not_divide_is_refused(tiny_config):
    with pytest.raises(ValueError, match="expert_parallel 2 does not divide the 1 processes: launch a multiple of it"):
        train(tiny_config("expert_parallel=2"))


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="expert_parallel is 2, but the model has no experts: leave it out"):
        check_spread(nn.Linear(2, 2), 2)
    check_spread(fresh_layer("soft", part(0)), 2)
    check_spread(nn.Linear(2, 2), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["expert_parallel=0"], "expert_parallel counts processes from 1, got 0"),
        (["expert_parallel=2", "precision=fp16"], "cannot skip steps in all processes alike, as fp16 must: take bf16"),
        (["expert_parallel=2", "lora.targets=[x]"], "expert_parallel has no adapters for experts"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tiny_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(*overrides)


def test_a_share_is_read_from_a_whole_checkpoint(tiny_config, tmp_path):
    config = tiny_config()
    whole = build(config).model
    optimizer = torch.optim.AdamW(whole.parameters())
    sum(p.sum() for p in whole.parameters()).backward()
    optimizer.step()
    save_checkpoint(tmp_path, whole, optimizer, Progress(3, 24), keep_last=1)
    for rank in range(2):
        share = build(config, part(rank)).model
        moments = torch.optim.AdamW(share.parameters())
        assert load_newest(tmp_path, share, moments, warn=None) == Progress(3, 24)
        expected = own_share(whole.state_dict(), share)
        assert sum(len(expected[name]) for name in spread_parameters(share)) == 4 * 2
        for name, parameter in share.named_parameters():
            assert torch.equal(parameter, expected[name]), name
            state = optimizer.state[whole.get_parameter(name)]
            for entry, value in moments.state[parameter].items():
                of_all = own_share({name: state[entry]}, share) if value.ndim else {name: state[entry]}
                assert torch.equal(value, of_all[name]), (name, entry)


def test_a_checkpoint_of_another_number_of_experts_is_named(tiny_config, tmp_path):
    model = build(tiny_config(f"{MOE}.router=uniform")).model
    save_checkpoint(tmp_path, model, torch.optim.AdamW(model.parameters()), Progress(1, 8), keep_last=1)
    other = build(tiny_config(f"{MOE}.router=uniform", f"{MOE}.num_experts=8"), part(1)).model
    with pytest.raises(ValueError, match=r"another model than .*experts\.b_in is of 4 experts there, of 8 here"):
        load_newest(tmp_path, other, torch.optim.AdamW(other.parameters()), warn=None)


def test_a_share_that_was_read_takes_no_more_memory_than_it_needs(tmp_path):
    layer = fresh_layer("soft", part(1))
    save_file(fresh_layer("soft").state_dict(), tmp_path / "layer.safetensors")
    found = load_shares(tmp_path / "layer.safetensors", layer)
    assert torch.equal(found["experts.w_in"], layer.experts.w_in)
    assert found["experts.w_in"].untyped_storage().nbytes() == layer.experts.w_in.nbytes


def test_a_run_may_start_from_a_whole_model(tiny_config, tmp_path):
    whole = train(tiny_config("steps=1", "optim.warmup=0"))
    model = load_file(whole / WEIGHTS)
    share = build(tiny_config(f"init={whole}"), part(1)).model
    assert spread_parameters(share)
    for name, weight in share.state_dict().items():
        assert torch.equal(weight, own_share(model, share)[name]), name
    other = f"{MOE}.router=uniform", f"{MOE}.num_experts=8"
    with pytest.raises(ValueError, match=r"init: .* is not built as `model` says: .* is of 4 experts there, of 8 here"):
        build(tiny_config(f"init={whole}", *other), part(1))


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, expected):
    files = (WEIGHTS, "checkpoints/step_00000006/model.safetensors", "checkpoints/step_00000006/optimizer.safetensors")
    for file in files:
        tensors, others = load_file(found / file), load_file(expected / file)
        assert [*tensors] == [*others]
        for name in tensors:
            torch.testing.assert_close(tensors[name], others[name], rtol=1e-4, atol=2e-6, msg=f"{file}: {name}")
    assert [line["step"] for line in metrics(found)] == [line["step"] for line in metrics(expected)]
    for name in ("loss", "gradient_norm", "val/loss"):
        numbers = [[line[name] for line in metrics(run) if name in line] for run in (found, expected)]
        torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_runs_with_spread_experts_train_the_model_that_one_process_trains(tiny_config, tmp_path, scenes):
    def config(name, expert_parallel, *overrides):
        of_run = f"out={tmp_path / name}", f"expert_parallel={expert_parallel}"
        return tiny_config(*SETTINGS, f"data.val={scenes}/val", "eval.every=3", *of_run, *overrides)

    one = train(config("one", 1))
    train_on(2, config("two", 2, "steps=3"))
    for name in ("by_one", "by_four"):
        copytree(tmp_path / "two", tmp_path / name)
    train_on(2, config("two", 2), config("whole", 2))
    train_on(4, config("by_four", 4), config("two_by_two", 2))
    train(config("by_one", 1))
    for name in ("whole", "two", "by_one", "by_four", "two_by_two"):
        assert_same_run(tmp_path / name, one)
    assert (tmp_path / "two" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
