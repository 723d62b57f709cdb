"""Branches: runs that go on from another's checkpoint, or from its weights; and killed runs that go on exactly."""

import json
import os
import signal

import pytest
import torch
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


def test_a_trunk_from_before_there_was_a_setting_had_its_default(tiny_config, tmp_path):
    train(tiny_config("out=trunk", "steps=4"))
    saved = tmp_path / "trunk/config.yaml"
    lines = saved.read_text().splitlines(keepends=True)
    saved.write_text("".join(line for line in lines if line not in ("  start: reference\n", "  name: adamw\n")))
    assert len(saved.read_text().splitlines()) == len(lines) - 2
    train(tiny_config("out=branch", "steps=5", "init=trunk/checkpoints/step_00000004"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("steps=4", "has 4 steps behind it, which count: give more than 4 steps"),
        ("optim.name=sgd", r"has optim\.name='adamw', not 'sgd'"),
        ("optim.options={amsgrad: true}", r"has optim\.options\S*=None, not True"),
        ("loss=clip", "has loss='siglip', not 'clip'"),
        ("model.image_moe.num_experts=2", r"has model\.image_moe\.num_experts=4, not 2"),
        ("lora.targets=['visual[.].*[.]attn']", r"has lora\.rank=None, not 8"),
        ("init=nowhere/checkpoints/step_00000001", "is no checkpoint in a run folder: there is no nowhere/config.yaml"),
        ("init=trunk/checkpoints/step_00000001", "step_00000001 cannot be read"),
    ],
)
def test_what_cannot_be_a_branch_is_refused_before_anything_is_written(tiny_config, tmp_path, change, told):
    train(tiny_config("out=trunk", "steps=4"))
    with pytest.raises(ValueError, match=told):
        train(tiny_config("out=branch", "steps=5", "init=trunk/checkpoints/step_00000004", change))
    assert not (tmp_path / "branch").exists()


def test_a_branch_with_other_batches_takes_no_budget_in_samples(tiny_config):
    train(tiny_config("out=trunk", "steps=4"))
    branch = ("out=branch", "init=trunk/checkpoints/step_00000004", "batch_size=4")
    with pytest.raises(
        ValueError, match=r"has seen 32 samples in 4 steps, which are no steps of batch_size=4: give the"
    ):
        train(tiny_config(*branch, "steps=null", "samples=40"))
    lines = (train(tiny_config(*branch, "steps=5")) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["samples_seen"] == 36


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


TRUNK, POINT = "trunk/checkpoints/step_00000004", "init=trunk/checkpoints/step_00000004"
AVERAGES = "model_ema/open_clip_model.safetensors"


def test_averages_that_the_trunk_did_not_keep_begin_at_its_weights(tiny_config, capsys):
    train(tiny_config("out=trunk", "steps=4"))
    branch = train(tiny_config("out=branch", "steps=5", POINT, "ema={decay: 0.5, every: 9}"))
    assert (
        "trunk/checkpoints/step_00000004 has no averaged weights: they begin as its weights" in capsys.readouterr().err
    )
    averages, begun = load_file(branch / AVERAGES), load_file(f"{TRUNK}/model.safetensors")
    assert all(torch.equal(averages[name], weight) for name, weight in begun.items())


def test_a_branch_may_leave_the_averages_of_its_trunk_behind(tiny_config, capsys):
    train(tiny_config("out=trunk", "steps=4", "ema={decay: 0.5}"))
    branch = train(tiny_config("out=branch", "steps=5", POINT))
    assert "has averaged weights, which end here: ema is not set" in capsys.readouterr().err
    assert not (branch / "model_ema").exists()
    train(tiny_config("out=plain", "steps=4"))
    plain = train(tiny_config("out=of_plain", "steps=5", POINT.replace("trunk", "plain")))
    assert (branch / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("trunk", "branch"), [("['^text[.]']", "[]"), ("[]", "['^text[.]']")])
def test_a_branch_with_averages_may_train_other_parts_than_its_trunk(tiny_config, trunk, branch):
    averaged = "ema={decay: 0.5, every: 4}"
    train(tiny_config("out=trunk", "steps=4", averaged, f"freeze={trunk}"))
    done = train(tiny_config("out=branch", "steps=5", averaged, f"freeze={branch}", POINT))
    averages, weights = load_file(done / AVERAGES), load_file(f"{TRUNK}/model.safetensors")
    kept = load_file(f"{TRUNK}/ema.safetensors")
    assert any(name.startswith("visual.") for name in kept)
    for name, average in averages.items():
        of_text = name.startswith("text.")
        assert torch.equal(average, weights[name] if of_text else kept.get(name, weights[name])), name
