"""Two CPU processes under `accelerate launch`: they compute together what one computes, and stop together."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from softmoe_clip.data_pipelines.ledger import read_ledger

pytestmark = pytest.mark.slow

# A larger eps: Adam divides noise by itself where a gradient should be zero, as that of a key's bias.
SETTINGS = ("optim.eps=0.0001", "optim.schedule=constant")


@pytest.fixture
def command(tiny_yaml, tmp_path):
    """The command of a run, on one process or launched on two."""

    def make(run, num_processes, *overrides):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch = [
            "accelerate.commands.launch",
            *options,
            f"--num_processes={num_processes}",
            f"--main_process_port={port}",
        ]
        start = ["-m", *launch] if num_processes > 1 else []
        train = ["-m", "softmoe_clip", "train", str(tiny_yaml), f"out={run}", *SETTINGS, *overrides]
        return [sys.executable, *start, *train]

    return make


@pytest.fixture
def finish(command, tmp_path, process_environment):
    """Run to the end; the run itself says how many processes took part."""

    def run_to_the_end(run, num_processes, *overrides):
        line = command(run, num_processes, *overrides)
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=process_environment)
        assert done.returncode == 0, done.stderr
        assert f"{num_processes} process(es) on cpu" in done.stderr
        return run

    return run_to_the_end


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, expected):
    weights, others = (load_file(run / "model/open_clip_model.safetensors") for run in (found, expected))
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-5, atol=1e-6, msg=name)
    assert [line["step"] for line in metrics(found)] == [line["step"] for line in metrics(expected)]
    for name in ("loss", "gradient_norm", "samples_seen", "replaced", "val/loss"):
        numbers = [[line[name] for line in metrics(run) if name in line] for run in (found, expected)]
        torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-5, msg=name)
    ledgers = [
        sorted(map(tuple, (entry.items() for entry in read_ledger(r / "skipped.jsonl")))) for r in (found, expected)
    ]
    assert ledgers[0] == ledgers[1]


def test_two_processes_train_the_model_that_one_trains(finish, tmp_path, damaged_shards, scenes):
    settings = (f"data.train={damaged_shards}", f"data.val={scenes}/val", "eval.every=3", "steps=8", "log_every=2")
    one, two = finish(tmp_path / "one", 1, *settings), finish(tmp_path / "two", 2, *settings)
    assert len(read_ledger(one / "skipped.jsonl")) > 10
    assert_same_run(two, one)


def test_a_run_begun_by_two_processes_is_ended_by_one_and_the_other_way_round(finish, tmp_path, damaged_shards):
    data = f"data.train={damaged_shards}"
    one = finish(tmp_path / "one", 1, data, "steps=8")
    for first, second in ((2, 1), (1, 2)):
        run = tmp_path / f"{first}{second}"
        finish(run, first, data, "steps=5")
        finish(run, second, data, "steps=8")
        assert_same_run(run, one)


def test_two_processes_train_the_adapters_that_one_trains(finish, tmp_path, scenes):
    targets = "lora.targets=['visual[.].*[.](attn|experts|c_fc)','text[.].*[.]attn']"
    settings = (f"data.val={scenes}/val", "eval.every=3", "steps=6", targets, "optim.lr=0.01")
    one, two = finish(tmp_path / "one", 1, *settings), finish(tmp_path / "two", 2, *settings)
    assert_same_run(two, one)
    checkpoints = [load_file(run / "checkpoints/step_00000006/model.safetensors") for run in (one, two)]
    for name, tensor in checkpoints[0].items():
        torch.testing.assert_close(checkpoints[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert sum(".lora_B." in name for name in checkpoints[0]) == 6


def ranks(launcher):
    """The processes that the launcher started, by rank."""
    found = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if "softmoe_clip" in child.cmdline() and "resource_tracker" not in " ".join(child.cmdline()):
            found.setdefault(int(child.environ().get("RANK", -1)), child)
    return found


@pytest.mark.parametrize("receiver", ["a rank", "the launcher"])
def test_a_signal_stops_both_processes_at_one_step(command, finish, tmp_path, process_environment, receiver):
    run = tmp_path / "run"
    line = command(run, 2, "steps=100000", "checkpoint_every=0")
    with open(tmp_path / "stderr.txt", "w") as told:
        launcher = subprocess.Popen(line, cwd=tmp_path, env=process_environment, stderr=told, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
            assert launcher.poll() is None, (tmp_path / "stderr.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        both = ranks(launcher)
        assert sorted(both) == [0, 1]
        both[1].send_signal(signal.SIGTERM) if receiver == "a rank" else launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=120) == 1  # whatever its processes end with, here with 75
        psutil.wait_procs(both.values(), timeout=30)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    stops = re.findall(r"stopped after step (\d+) of 100000", (tmp_path / "stderr.txt").read_text())
    assert len(stops) == 1  # told by the main process alone
    step = int(stops[0])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    finish(run, 1, f"steps={step + 2}")
    assert [line["step"] for line in metrics(run)] == [*range(1, step + 3)]
