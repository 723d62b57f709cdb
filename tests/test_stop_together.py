"""Several processes of one run: a signal to any stops all at one step, a failure ends all; the run goes on anywhere."""

import json
import os
import re
import shutil
import signal
import socket
import time

import pytest
import torch
from forked import start_verb
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

# A larger eps: Adam divides noise by itself where a gradient should be zero, as that of a key's bias.
SETTINGS = ("optim.eps=0.0001", "optim.schedule=constant")
WEIGHTS = "model/open_clip_model.safetensors"


@pytest.fixture
def launch(tiny_yaml, tmp_path):
    """Start the ranks of a run, as a launcher would; the stderr of rank r goes to r.txt."""
    started = []

    def start(num_processes, *overrides, of_rank=((), ()), of_main=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(num_processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in place.items()} if num_processes > 1 else {}
            arguments = ["train", tiny_yaml, *SETTINGS, *overrides, *of_rank[rank]]
            limits = {} if rank else of_main or {}
            started.append(start_verb(arguments, tmp_path, tmp_path / f"{rank}.txt", environment, **limits))
        return started[-num_processes:]

    yield start
    for process in started:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)


def ended(processes):
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_signal_to_one_rank_stops_both_with_status_75_and_one_process_elsewhere_ends_the_run(launch, tmp_path):
    there = f"out=file://{tmp_path}/there"
    ranks = launch(2, there, f"working_folder={tmp_path}/here", "steps=100000", "checkpoint_every=0")
    log, deadline = tmp_path / "here/metrics.jsonl", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 3:
        assert all(rank.is_alive() for rank in ranks), [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert ended(ranks) == [75, 75]
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert "2 process(es) on cpu" in told[0]
    (stopped,) = re.findall(r"^stopped after step (\d+) of 100000; start the same command again", told[0], re.MULTILINE)
    assert told[1] == ""  # told once, by the main process
    step = int(stopped)
    assert [path.name for path in (tmp_path / "there/checkpoints").iterdir()] == [f"step_{step:08d}"]

    assert ended(launch(1, there, f"working_folder={tmp_path}/elsewhere", f"steps={step + 2}")) == [0]
    told = (tmp_path / "0.txt").read_text()
    assert "this run began with processes 2 (now 1)" in told
    assert f"going on after step {step} of {step + 2}" in told
    assert ended(launch(1, f"out={tmp_path}/one", f"steps={step + 2}")) == [0]
    weights, others = (load_file(run / WEIGHTS) for run in (tmp_path / "there", tmp_path / "one"))
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-5, msg=name)
    lines, expected = metrics(tmp_path / "there"), metrics(tmp_path / "one")
    assert [line["step"] for line in lines] == [*range(1, step + 3)]
    losses = [torch.tensor([line["loss"] for line in run]) for run in (lines, expected)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 4])
def test_machines_that_do_not_share_a_folder_refuse_to_go_on_from_different_steps(launch, tmp_path, steps):
    assert ended(launch(1, f"out={tmp_path}/a", "steps=2")) == [0]
    of_rank = [(f"out={tmp_path}/{name}",) for name in "ab"]
    assert ended(launch(2, f"steps={steps}", of_rank=of_rank)) == [2, 2]
    for rank in (0, 1):
        told = (tmp_path / f"{rank}.txt").read_text().splitlines()[-1]
        assert (
            "the step of the newest checkpoint is 0 for one process and 2 for another: out must be a folder that"
            in told
        )


def last_line(file):
    return file.read_text().splitlines()[-1]


def test_a_full_disk_of_the_main_process_ends_all_and_is_named(launch, tmp_path):
    settings = (f"out={tmp_path}/run", "trackers=[]", "steps=100000", "checkpoint_every=0")
    statuses = ended(launch(2, *settings, of_main={"largest_file": 15_000}))
    assert statuses[0] == 2
    assert statuses[1] not in (0, None)
    told = f"softmoe-clip: {tmp_path}/run/metrics.jsonl could not be written (File too large): mend that and start"
    assert last_line(tmp_path / "0.txt").startswith(told)


def test_what_fails_while_the_main_process_measures_ends_all(launch, scenes, tmp_path):
    val = shutil.copytree(scenes / "val", tmp_path / "val")
    settings = (f"out={tmp_path}/run", f"data.val={val}", "eval.every=40", "steps=100000", "checkpoint_every=0")
    both, log = launch(2, *settings), tmp_path / "run/metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 3:
        assert all(rank.is_alive() for rank in both), [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
        time.sleep(0.01)
    val.rename(tmp_path / "elsewhere")
    statuses = ended(both)
    assert statuses[0] == 2
    assert statuses[1] not in (0, None)
    assert re.match(f"softmoe-clip: .*{val}", last_line(tmp_path / "0.txt"))


def test_what_a_run_still_owes_is_done_by_all_its_processes_together(launch, tmp_path, scenes):
    run, settings = tmp_path / "run", ("sharding=full", f"data.val={scenes}/val", "eval.every=2")
    assert ended(launch(2, f"out={run}", "steps=4", *settings)) == [0, 0]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "val/loss" in lines[-1]
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))  # as if a stop had left it out
    assert ended(launch(2, f"out={run}", "steps=5", *settings)) == [0, 0]
    measured = [line for line in metrics(run) if "val/loss" in line]
    assert [line["step"] for line in measured] == [2, 4, 5]
    assert measured[1]["val/loss"] == json.loads(lines[-1])["val/loss"]

    before = (run / WEIGHTS).read_bytes()
    shutil.rmtree(run / "model")
    for told in ("the model is", "is finished (5 steps); nothing to do"):
        assert ended(launch(2, f"out={run}", "steps=5", *settings)) == [0, 0]
        assert told in (tmp_path / "0.txt").read_text()
        assert (run / WEIGHTS).read_bytes() == before
