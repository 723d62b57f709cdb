"""Branches: runs that go on from another's checkpoint, or from its weights; and killed runs that go on exactly."""

import json
import os
import signal

import pytest
from safetensors.torch import load_file

from softmoe_clip.training.loop import train
from softmoe_clip.training.run_log import RunLog

WEIGHTS = "model/open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rates(run):
    return [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text().splitlines()]


RSQRT = ("optim.schedule=rsqrt", "optim.timescale=3", "ema={decay: 0.5}")


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_a_cooldown_that_branches_off_is_what_the_trunk_would_have_been(tiny_config, name):
    settings = (*RSQRT, f"optim.name={name}")
    trunk = train(tiny_config("out=trunk", "steps=6", *settings))
    point = "init=trunk/checkpoints/step_00000004"
    branch = train(tiny_config("out=branch", "steps=7", "optim.cooldown=3", point, *settings))
    in_one = train(tiny_config("out=one", "steps=7", "optim.cooldown=3", *settings))
    assert rates(branch)[0] == rates(trunk)[4]
    assert rates(branch) == rates(in_one)[4:]
    assert rates(branch)[-1] == pytest.approx(rates(trunk)[4] / 3)
    for file in (WEIGHTS, "model_ema/open_clip_model.safetensors", "checkpoints/step_00000007/optimizer.safetensors"):
        assert (branch / file).read_bytes() == (in_one / file).read_bytes(), file


def test_a_branch_goes_on_after_its_trunk_is_gone(tiny_config, tmp_path):
    train(tiny_config("out=trunk", "steps=4", *RSQRT))
    settings = ("out=branch", "init=trunk/checkpoints/step_00000004", "optim.schedule=constant")
    branch = train(tiny_config(*settings, "steps=5"))
    (tmp_path / "trunk").rename(tmp_path / "gone")
    train(tiny_config(*settings, "steps=6"))
    assert [json.loads(line)["step"] for line in (branch / "metrics.jsonl").read_text().splitlines()] == [5, 6]


def test_a_branch_may_be_written_to_a_url(tiny_config, tmp_path):
    train(tiny_config("out=trunk", "steps=4", *RSQRT))
    settings = ("steps=6", "init=trunk/checkpoints/step_00000004", *RSQRT)
    here, there = train(tiny_config("out=branch", *settings)), tmp_path / "bucket/branch"
    train(tiny_config(f"out=file://{there}", f"working_folder={tmp_path / 'work'}", *settings))
    assert (there / WEIGHTS).read_bytes() == (here / WEIGHTS).read_bytes()


def test_a_new_run_from_a_trunks_weights_begins_at_its_own_full_rate(tiny_config):
    constant = ("optim.schedule=constant", "optim.warmup=0")
    trunk = train(tiny_config("out=trunk", "steps=2", *constant))
    branch = train(tiny_config("out=branch", "init=trunk", "steps=4", "optim.cooldown=4", *constant))
    assert rates(branch) == pytest.approx([0.001, 0.00075, 0.0005, 0.00025])
    assert rates(branch)[0] == rates(trunk)[-1]
    assert load_file(branch / WEIGHTS).keys() == load_file(trunk / WEIGHTS).keys()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("steps=4", "has 4 steps behind it, which count: give more than 4 steps"),
        ("optim.name=sgd", r"has optim\.name='adamw', not 'sgd'"),
        ("model.image_moe.num_experts=2", r"has model\.image_moe\.num_experts=4, not 2"),
        ("init=nowhere/checkpoints/step_00000001", "is no checkpoint in a run folder: there is no nowhere/config.yaml"),
        ("init=trunk/checkpoints/step_00000001", "step_00000001 is no whole checkpoint"),
    ],
)
def test_what_cannot_be_a_branch_is_refused_before_anything_is_written(tiny_config, tmp_path, change, told):
    train(tiny_config("out=trunk", "steps=4"))
    with pytest.raises(ValueError, match=told):
        train(tiny_config("out=branch", "steps=5", "init=trunk/checkpoints/step_00000004", change))
    assert not (tmp_path / "branch").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lion", "lamb", "adan", "adafactorbv", "lookahead_nadamlegacy"])
def test_a_run_with_any_optimizer_that_is_killed_goes_on_to_the_same_bits(tiny_config, name):
    settings = ("ema={decay: 0.5}", f"optim.name={name}", "checkpoint_every=2")
    whole = train(tiny_config("out=whole", *settings))
    if (child := os.fork()) == 0:
        write = RunLog.write

        def write_and_die(log, step, numbers):
            write(log, step, numbers)
            if step == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        RunLog.write = write_and_die
        try:
            train(tiny_config("out=killed", *settings))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    killed = train(tiny_config("out=killed", *settings))
    for file in (WEIGHTS, "model_ema/open_clip_model.safetensors", "checkpoints/step_00000006/optimizer.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
