"""What a run that goes on still owes: an evaluation that a stop left out, a model folder that somebody removed."""

import json
import os
import shutil
import signal

import pytest

from softmoe_clip.data_pipelines.samples import all_captions
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer
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
        with monkeypatch.context() as patched:
            patched.setattr(RunLog, "write", write_and_signal)
            with pytest.raises(Stopped, match=f"stopped after step {step} "):
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


def test_a_run_goes_on_with_data_and_tokenizer_that_were_moved(tiny_config, scenes, tokenizer_file, tmp_path):
    """As jobs do whose data is copied to a new scratch folder each time."""
    whole = train(tiny_config("out=whole", "optim.schedule=constant"))
    for number, steps in ((1, 3), (2, 6)):
        place = tmp_path / f"scratch{number}"
        shutil.copytree(scenes / "train", place / "train")
        shutil.copy(tokenizer_file, place)
        here = (f"data.train={place}/train", f"tokenizer={place / tokenizer_file.name}", "optim.schedule=constant")
        run = train(tiny_config("out=run", f"steps={steps}", *here))
        shutil.rmtree(place)
    assert metrics(run) == metrics(whole)
    assert (run / "model" / WEIGHTS).read_bytes() == (whole / "model" / WEIGHTS).read_bytes()
    shutil.copytree(scenes / "train", place / "train")
    train_tokenizer(all_captions(ShardSet.open(str(place / "train"))), place / tokenizer_file.name, vocab_size=99)
    with pytest.raises(ValueError, match=r"other files than are there now \(tokenizer, tokenizer.model: "):
        train(tiny_config("out=run", "steps=7", *here))


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


@pytest.mark.parametrize("gone", ["model", "model_ema"])
def test_a_finished_run_whose_model_is_gone_writes_it_again(tiny_config, folder_bytes, capsys, gone):
    run = train(tiny_config("ema={decay: 0.5}"))
    kept = {"model", "model_ema", "checkpoints"}
    before = {name: data for name, data in folder_bytes(run).items() if name.partition("/")[0] in kept}
    shutil.rmtree(run / gone)
    train(tiny_config("ema={decay: 0.5}"))
    after = {name: data for name, data in folder_bytes(run).items() if name.partition("/")[0] in kept}
    assert after == before
    assert f"the model is {run}/model" in capsys.readouterr().err


def test_a_longer_run_whose_model_is_gone_writes_that_of_its_last_step(tiny_config, capsys):
    run = train(tiny_config("optim.schedule=constant"))
    before = (run / "model" / WEIGHTS).read_bytes()
    shutil.rmtree(run / "model")
    train(tiny_config("optim.schedule=constant", "steps=3"))
    assert (run / "model" / WEIGHTS).read_bytes() == before
    assert "trained 6 steps; the model is" in capsys.readouterr().err


def test_a_finished_run_whose_model_and_last_checkpoint_are_gone_ends_the_same(tiny_config, capsys):
    run = train(tiny_config())
    before = (run / "model" / WEIGHTS).read_bytes()
    shutil.rmtree(run / "model")
    damaged = run / "checkpoints/step_00000006/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(tiny_config())
    assert (run / "model" / WEIGHTS).read_bytes() == before
    assert "going on after step 4 of 6" in capsys.readouterr().err
