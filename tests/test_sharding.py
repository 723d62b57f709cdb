"""Runs whose weights, gradients and optimizer state are shared out over processes make the model that one makes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sharded_processes import run_verb

# A larger eps: Adam divides noise by itself where a gradient should be zero, as that of a key's bias.
SETTINGS = ("optim.eps=0.0001", "optim.schedule=constant", "steps=4", "checkpoint_every=2")
WEIGHTS = "model/open_clip_model.safetensors"
EXPERTS = "visual.transformer.resblocks.1.mlp.experts.w_in"


@pytest.fixture
def finish(tiny_yaml, tmp_path):
    """Train to the end in so many processes; the first of them says how many took part."""

    def run(name, num_processes, *overrides):
        done = run_verb(num_processes, tmp_path, "train", tiny_yaml, f"out={tmp_path / name}", *SETTINGS, *overrides)
        assert [status for status, _ in done] == [0] * num_processes, done
        assert f"{num_processes} process(es) on cpu" in done[0][1]
        assert ("shared out over 2 processes" in done[0][1]) == (num_processes > 1 and "sharding=full" in overrides)
        return tmp_path / name

    return run


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, expected, files=(WEIGHTS,)):
    for file in files:
        weights, others = (load_file(run / file) for run in (found, expected))
        assert weights.keys() == others.keys()
        for name in weights:
            torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-5, msg=f"{file} {name}")
    lines, others = metrics(found), metrics(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for name in ("loss", "gradient_norm", "logit_scale", "val/loss", "distill_loss"):
        numbers = [[line[name] for line in run if name in line] for run in (lines, others)]
        torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_two_processes_with_shares_train_the_model_that_one_trains(finish, tmp_path, scenes):
    settings = ("chunk_size=3", "ema.every=1", f"data.val={scenes}/val", "eval.every=2", "loss=clip")
    one, two = finish("one", 1, *settings), finish("two", 2, *settings, "sharding=full")
    assert_same_run(two, one, files=(WEIGHTS, "model_ema/open_clip_model.safetensors"))


@pytest.mark.slow
def test_a_sharded_checkpoint_is_gone_on_from_by_as_many_processes_to_the_bit_and_by_one_without_sharding(
    finish, tmp_path, folder_bytes
):
    sharded = ("sharding=full", "ema.every=1")
    whole = finish("whole", 2, *sharded)
    bits = (WEIGHTS, "model_ema/open_clip_model.safetensors")
    checkpoint = whole / "checkpoints/step_00000004"
    names = [file.name for file in sorted(checkpoint.iterdir())]
    parts = names[2:]
    assert names == ["SHA256SUMS", "progress.json", *parts]
    assert len(parts) == 2
    sums = (checkpoint / "SHA256SUMS").read_text()
    assert all(part in sums for part in parts)
    for part in parts:  # experts by expert, with their moments and averages
        with safe_open(checkpoint / part, "pt") as file:
            keys = (f"model/{EXPERTS}", f"optimizer/{EXPERTS}|exp_avg", f"ema/{EXPERTS}")
            assert [file.get_slice(key).get_shape() for key in keys] == [[2, 32, 128]] * 3

    for name, num_processes, settings in (("two", 2, sharded), ("one", 1, sharded[1:]), ("ddp", 2, sharded[1:])):
        run = tmp_path / name
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints/step_00000004")
        shutil.rmtree(run / "model")
        (run / "metrics.jsonl").write_text("")
        finish(name, num_processes, *settings)
        for file in bits:
            weights, others = (load_file(folder / file) for folder in (run, whole))
            for key in others:
                if name == "two":
                    assert torch.equal(weights[key], others[key]), key
                else:
                    torch.testing.assert_close(weights[key], others[key], rtol=1e-4, atol=1e-5, msg=key)
    last = {path.name for path in (tmp_path / "one/checkpoints/step_00000004").iterdir()}
    assert {"model.safetensors", "optimizer.safetensors"} < last
    shutil.rmtree(tmp_path / "one/model")  # and back: a whole checkpoint, gone on from with sharding
    finish("one", 2, *sharded, "steps=5")
    # Any number of steps later, shares that one process has damaged are told from whole ones.
    damaged = checkpoint / parts[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    shutil.rmtree(whole / "model")
    done = finish("whole", 2, *sharded, "steps=5")
    assert (done / "model").exists()


@pytest.mark.slow
def test_each_process_holds_its_share_of_every_parameter_and_of_the_experts(tiny_yaml, tmp_path):
    found = look(2, tmp_path, "shares", str(tiny_yaml))
    assert [(held["processes"], held["rank"]) for held in found] == [(2, 0), (2, 1)]
    for held in found:
        assert held["by_rows"]
        assert held["whole"][EXPERTS] == [4, 32, 128]
        assert held["local"][EXPERTS] == [2, 32, 128]
        assert held["scalars"] == ["logit_scale", "logit_bias", "visual.transformer.resblocks.1.mlp.router_scale"]
    for name, shape in found[0]["whole"].items():
        assert sum(held["local"][name][0] for held in found) == shape[0]


@pytest.mark.slow
def test_optimizers_that_take_a_share_for_the_whole_are_refused(tiny_yaml, tmp_path):
    names = ("adamw", "lion", "nadamw", "sgdw", "lamb", "adafactorbv", "muon", "adopt", "laprop", "mars", "kron")
    said = look(2, tmp_path, "optimizers", str(tiny_yaml), *names)
    assert said[0] == said[1]
    print(said[0])
    assert said[0]["adamw"] == said[0]["lion"] == ""
