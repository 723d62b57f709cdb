"""metrics.jsonl holds each step once, however often a run was stopped."""

import json
import os

import pytest

from softmoe_clip.training.run_log import RunLog, cut_back, environment


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_numbers_stand_in_the_file_as_soon_as_they_are_written(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write(1, {"loss": 2.5})
        log.write(2, {"loss": 0.1 + 0.2})
        assert lines(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 0.1 + 0.2}]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_what_is_no_number_is_null_since_json_has_nothing_else_for_it(tmp_path):
    with RunLog(tmp_path, 0) as log:
        log.write(1, {"loss": 2.5, "gradient_norm": float("inf"), "routing/a/dropped": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text().endswith(', "gradient_norm": null, "routing/a/dropped": null}\n')


def test_a_run_that_goes_on_drops_the_steps_it_will_do_again(tmp_path):
    with RunLog(tmp_path, 0) as log:
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    with RunLog(tmp_path, 2) as log:
        log.write(3, {"loss": 30.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


def test_several_lines_of_one_step_stay(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "loss": 1}\n{"step": 2, "val/loss": 3}\n{"step": 3, "loss": 1}\n')
    cut_back(file, 2)
    assert file.read_text() == '{"step": 2, "loss": 1}\n{"step": 2, "val/loss": 3}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damaged", [b"[]", b"7", b'{"step": 2, "lo', b'{"step": 2, "l\xff": 1}', b"\xff", b""])
def test_a_damaged_line_is_left_out(tmp_path, damaged):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 2}\n')
    assert cut_back(file, 2) == [{"step": 1}, {"step": 2}]
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_that_cannot_be_brought_to_the_disk_takes_no_place(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n')
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", no_disk)
        with pytest.raises(OSError, match="no disk"):
            cut_back(file, 1)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert cut_back(file, 1) == [{"step": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def no_disk(descriptor):
    raise OSError("no disk")


def test_nothing_is_made_where_there_is_nothing_to_cut(tmp_path):
    cut_back(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_tensorboard_shows_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": float(step)})
    with RunLog(tmp_path, 1) as log:
        log.write(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


def test_the_environment_is_what_a_reader_needs_to_run_it_again(tmp_path):
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["threads"] == 1
    assert facts["torch"]
