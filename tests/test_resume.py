"""Real runs, killed and stopped at awkward moments: started again, they end with the same bits."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

pytestmark = pytest.mark.slow

LAST_STEP = 150
SETTINGS = (f"steps={LAST_STEP}", "checkpoint_every=5", "data.num_workers=1")
WEIGHTS = "model/open_clip_model.safetensors"


@pytest.fixture
def start(tiny_yaml, tmp_path, process_environment):
    """Start `python -m softmoe_clip train` on a run, in a process group of its own; its stderr goes to stderr.txt."""
    started = []

    def begin(run, *overrides, largest_file=resource.RLIM_INFINITY):
        command = [sys.executable, "-m", "softmoe_clip", "train", str(tiny_yaml), f"out={run}", *SETTINGS, *overrides]
        with open(tmp_path / "stderr.txt", "w") as told:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=process_environment,
                stderr=told,
                start_new_session=True,
                preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY)),
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(process, happened, seconds=300):
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "the run ended before the moment came"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0002)


def steps(run):
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint_after(run, step):
    return lambda: any(int(p.name[5:]) >= step for p in (run / "checkpoints").glob("step_*"))


def half_written(folder, pattern):
    return lambda: any(folder.glob(pattern))


def test_kill_9_at_any_moment_changes_nothing(start, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(whole).wait() == 0
    moments = {
        "as the run begins": lambda: (run / "metrics.jsonl").exists(),
        "before the first checkpoint is whole": half_written(run / "checkpoints", ".step_*"),
        "between checkpoints": checkpoint_after(run, 15),
        "while a checkpoint is written": half_written(run / "checkpoints", ".step_0000003*"),
        "while the model is written": half_written(run, ".model.partial"),
        "much later": checkpoint_after(run, 90),
        "while a late checkpoint is written": half_written(run / "checkpoints", ".step_000001*"),
    }
    for moment, happened in moments.items():
        process = start(run)
        wait_until(process, happened)
        process.kill()
        assert process.wait() == -signal.SIGKILL, moment
    assert start(run).wait() == 0
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert steps(run) == steps(whole) == [*range(1, LAST_STEP + 1)]
    left = sorted(path.name for path in run.iterdir())
    assert left == sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000145", "step_00000150"]


def test_sigterm_and_ctrl_c_save_the_state_and_say_so_in_one_line(start, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(whole).wait() == 0
    going_on = 0
    for number, until in ((signal.SIGTERM, 23), (signal.SIGINT, 60)):
        process = start(run)
        wait_until(process, lambda: (run / "metrics.jsonl").exists() and len(steps_so_far(run)) >= until)  # noqa: B023
        # Ctrl-C in a terminal reaches the loader's processes as well; a scheduler's SIGTERM only the one it started.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        assert process.wait() == 75
        told = (tmp_path / "stderr.txt").read_text().splitlines()
        stopped_after = int(max((run / "checkpoints").glob("step_*")).name[5:])
        assert stopped_after >= until
        stop = f"stopped after step {stopped_after} of {LAST_STEP}; start the same command again to go on"
        assert told[-1] == stop
        assert told[1:-1] == ([f"going on after step {going_on} of {LAST_STEP}"] if going_on else [])
        going_on = stopped_after
    assert start(run).wait() == 0
    assert (run / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert steps(run) == [*range(1, LAST_STEP + 1)]


def steps_so_far(run):
    """All whole lines; the last one may just be written."""
    return (run / "metrics.jsonl").read_text().split("\n")[:-1]


def test_a_full_disk_stops_a_run_in_one_line_and_it_goes_on_afterwards(start, tmp_path):
    run, settings = tmp_path / "run", "optim.schedule=constant"
    assert start(run, settings, "steps=10").wait() == 0
    before = (run / WEIGHTS).read_bytes()
    assert start(run, settings, "steps=20", largest_file=len(before) // 2).wait() == 2
    told = (tmp_path / "stderr.txt").read_text()
    assert told.splitlines()[-1].startswith("softmoe-clip: no space left while writing ")
    assert "Traceback" not in told
    assert (run / WEIGHTS).read_bytes() == before
    assert not list(run.glob("**/.*"))
    assert start(run, settings, "steps=20").wait() == 0
    assert steps(run) == [*range(1, 21)]
