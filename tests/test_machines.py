"""Several machines, each a process with a folder of its own, train one run at a URL."""

import json

import pytest
from forked import start_verb
from sharded_processes import ended, places

from softmoe_clip.data_pipelines.ledger import read_ledger

pytestmark = pytest.mark.slow


@pytest.fixture
def machines(tiny_yaml, tmp_path):
    """Train on machines of these names; return the exit statuses and what they said."""

    def run(names, *overrides):
        started, files = [], [tmp_path / f"{name}.txt" for name in names]
        for name, file, place in zip(names, files, places(len(names)), strict=True):
            alone_there = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"} if place else {}
            out = (f"out=file://{tmp_path}/there", f"working_folder={tmp_path / name}")
            arguments = ["train", tiny_yaml, "optim.schedule=constant", *out, *overrides]
            started.append(start_verb(arguments, tmp_path, file, place | alone_there))
        return ended(started, files)

    return run


def replaced(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["replaced"] for line in lines]


def test_what_every_machine_replaced_is_told_and_counted_wherever_the_run_goes_on(
    machines, softmoe_clip, tiny_yaml, damaged_shards, tmp_path
):
    data = f"data.train={damaged_shards}"
    assert [status for status, _ in machines("ab", data, "steps=5")] == [0, 0]
    assert not (tmp_path / "b").exists()
    assert [status for status, _ in machines("c", data, "steps=8")] == [0]
    whole = tmp_path / "whole"
    softmoe_clip("train", tiny_yaml, "optim.schedule=constant", f"out={whole}", data, "steps=8")
    ledgers = [read_ledger(run / "skipped.jsonl") for run in (whole, tmp_path / "there")]
    assert ledgers[0] == ledgers[1]
    assert {entry["position"] // 4 % 2 for entry in ledgers[0] if entry["step"] <= 5} == {0, 1}  # of both machines
    assert replaced(tmp_path / "there") == replaced(whole)
