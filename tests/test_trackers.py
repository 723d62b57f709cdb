"""Trackers beside metrics.jsonl: one that is not installed is one sentence, one that is there gets every number."""

import json
import sys
import textwrap

import pytest

from softmoe_clip.config import MAY_CHANGE_AT_RESUME
from softmoe_clip.training.loop import train
from softmoe_clip.training.run_log import RunLog
from softmoe_clip.training.trackers import PACKAGES, check_trackers

# What Accelerate calls of wandb, written down: the real one is tried where it is installed.
WANDB = """
import json, pathlib

class Run:
    def __init__(self, **settings):
        self.file = pathlib.Path(settings["dir"]) / "calls.jsonl"
        self.tell("init", **settings)
    def tell(self, call, **what):
        with self.file.open("a") as file:
            file.write(json.dumps({"call": call, **what}) + "\\n")
    def log(self, values, step=None):
        self.tell("log", step=step, values=values)
    def finish(self):
        self.tell("finish")

class Config:
    def update(self, values, allow_val_change=False):
        run.tell("config", values=values, allow_val_change=allow_val_change)

config, run = Config(), None

def init(**settings):
    global run
    if settings["project"] == "refused":
        raise RuntimeError("api_key not configured\\n(no-tty)")
    run = Run(**settings)
    return run
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Each test works in its own folder, without the settings of whoever runs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """A package called wandb that writes down what it is asked to do."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/wandb.py").write_text(textwrap.dedent(WANDB))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    sys.modules.pop("wandb", None)


def calls(run):
    return [json.loads(line) for line in (run / "calls.jsonl").read_text().splitlines()]


def test_a_run_goes_on_in_the_same_wandb_run_and_logs_what_metrics_jsonl_has(recorder, tiny_config, tmp_path):
    constant = ("optim.schedule=constant", "trackers=[wandb]")
    train(tiny_config("steps=2", *constant))
    run = train(tiny_config("steps=3", *constant))
    told = calls(run)
    first, second = (call for call in told if call["call"] == "init")
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("softmoe-clip", "run", "allow")
    assert first["id"] == (run / "wandb_run_id.txt").read_text().strip() != ""
    settings = next(call for call in told if call["call"] == "config")
    assert settings["allow_val_change"]
    assert settings["values"]["model.image_moe.num_experts"] == 4
    assert settings["values"]["data.crop_scale"] == "[0.7, 1.0]"
    logged = [{"step": call["step"], **call["values"]} for call in told if call["call"] == "log"]
    assert logged == [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [call["call"] for call in told].count("finish") == 2
    assert not (run / "tensorboard").exists()


def test_a_run_at_a_url_goes_on_in_the_same_wandb_run_on_another_machine(recorder, tiny_config, tmp_path):
    where = ("optim.schedule=constant", "trackers=[wandb]", f"out=file://{tmp_path}/there")
    runs = [train(tiny_config(f"steps={2 + n}", f"working_folder={tmp_path / 'ab'[n]}", *where)) for n in (0, 1)]
    ids = [[call["id"] for call in calls(run) if call["call"] == "init"] for run in runs]
    assert ids[0] == ids[1][-1:]


def test_the_service_that_refuses_is_named_in_one_sentence(recorder, tiny_config, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    with pytest.raises(ValueError, match=r"^trackers: wandb did not start \(api_key not configured \(no-tty\)\): mend"):
        train(tiny_config("trackers=[wandb]"))


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_written(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr("softmoe_clip.training.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'wandb is not installed: pip install "softmoe-clip\[wandb\]", or leave it'):
        train(tiny_config("trackers=[wandb]"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match='comet_ml is not installed: pip install "comet-ml"'):
        check_trackers(("comet_ml",))


def test_every_tracker_of_accelerate_may_be_chosen_and_no_other(tiny_config):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert PACKAGES.keys() == LOGGER_TYPE_TO_CLASS.keys()
    for name in PACKAGES:
        assert tiny_config(f"trackers=[{name}]").trackers == (name,)
    with pytest.raises(ValueError, match=r"trackers.0 in the overrides must be one of tensorboard, wandb"):
        tiny_config("trackers=[wandbb]")
    with pytest.raises(ValueError, match="trackers names one twice: wandb, wandb"):
        tiny_config("trackers=[wandb,wandb]")
    assert "trackers" in MAY_CHANGE_AT_RESUME


def test_without_trackers_there_is_metrics_jsonl_alone(tmp_path):
    with RunLog(tmp_path / "run", 0, ()) as log:
        log.write(1, {"loss": 2.0})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_seconds_go_on_from_the_last_line_that_is_kept(tmp_path):
    with RunLog(tmp_path, 0) as log:
        assert log.seconds_before() == 0
        for step in (1, 2, 3):
            log.write(step, {"seconds": 10.0 * step})
    with RunLog(tmp_path, 2) as log:
        assert log.seconds_before() == 20
        assert [line["step"] for line in log.lines_before] == [1, 2]


def test_a_run_that_goes_on_counts_its_seconds_from_where_they_stood(tiny_config):
    for steps in (2, 4):
        run = train(tiny_config(f"steps={steps}", "optim.schedule=constant"))
    found = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert found == sorted(found)
    assert found[0] > 0
    assert len(found) == 4


@pytest.mark.slow
def test_the_real_wandb_writes_a_run_without_a_network(tiny_config, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = train(tiny_config("steps=2", "trackers=[wandb,tensorboard]"))
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert list((run / "tensorboard").glob("events.*"))
