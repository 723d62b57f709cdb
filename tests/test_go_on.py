"""What a run that goes on still owes: an evaluation that a stop left out."""

import json
import os
import signal

import pytest

from softmoe_clip.training.loop import Stopped, train
from softmoe_clip.training.run_log import RunLog

WEIGHTS = "open_clip_model.safetensors"
SPEED = ("pairs_per_second", "seconds")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stop_during(monkeypatch):
    """Train, and ask the run to stop while a step is done; the stop comes after that step."""

    def train_until(step, config):
        def write_and_signal(log, at, numbers):
            write(log, at, numbers)
            if at == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        write = RunLog.write
        with monkeypatch.context() as patched, pytest.raises(Stopped, match=f"stopped after step {step} "):
            patched.setattr(RunLog, "write", write_and_signal)
            train(config)

    return train_until


def metrics(run):
    """The numbers of each line, without those that tell how fast it was."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


@pytest.mark.parametrize("step", [3, 4])  # at step 4 an evaluation is due
def test_an_evaluation_that_a_stop_left_out_is_made_up(tiny_config, scenes, stop_during, step):
    settings = (f"data.val={scenes}/val", "eval.every=2", "ema={decay: 0.5}")
    whole = train(tiny_config("out=whole", *settings))
    stop_during(step, tiny_config(*settings))
    run = train(tiny_config(*settings))
    assert [line["step"] for line in metrics(run) if "val/loss" in line] == [2, 4, 6]
    assert metrics(run) == metrics(whole)
    assert (run / "model" / WEIGHTS).read_bytes() == (whole / "model" / WEIGHTS).read_bytes()


def test_an_evaluation_that_was_made_is_not_made_again(tiny_config, scenes):
    settings = (f"data.val={scenes}/val", "eval.every=2", "optim.schedule=constant")
    train(tiny_config("steps=4", *settings))
    run = train(tiny_config("steps=5", *settings))
    assert [line["step"] for line in metrics(run) if "val/loss" in line] == [2, 4, 5]


def test_a_branch_does_not_measure_what_was_its_trunks_to_measure(tiny_config, scenes):
    settings = (f"data.val={scenes}/val", "eval.every=4", "optim.schedule=constant")
    train(tiny_config("out=trunk", "steps=4", *settings))
    branch = train(tiny_config("out=branch", "steps=5", "init=trunk/checkpoints/step_00000004", *settings))
    assert [line["step"] for line in metrics(branch)] == [5, 5]
