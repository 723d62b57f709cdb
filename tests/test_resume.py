"""Real runs, killed and stopped at awkward moments: started again, they end with the same bits."""

import json
import os
import random
import signal
import time

import pytest
from forked import start_verb

from softmoe_clip.data_pipelines.ledger import read_ledger

SPEED = ("pairs_per_second", "seconds")  # what a second run need not repeat
pytestmark = pytest.mark.slow

LAST_STEP = 150
SETTINGS = (f"steps={LAST_STEP}", "checkpoint_every=5", "data.num_workers=1")
WEIGHTS = "model/open_clip_model.safetensors"


@pytest.fixture(scope="module")
def begin(tiny_yaml, damaged_shards, tmp_path_factory):
    """Start `softmoe-clip train` on a run, in a session of its own; its stderr goes to RUN.txt."""
    folder, started = tmp_path_factory.mktemp("work"), []

    def start(run, *overrides, **limits):
        settings = (f"out={run}", f"data.train={damaged_shards}", *SETTINGS, *overrides)
        process = start_verb(["train", tiny_yaml, *settings], folder, run.with_suffix(".txt"), **limits)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ended(begin(run)) == 0, run.with_suffix(".txt").read_text()
    assert steps(run) == [*range(1, LAST_STEP + 1)]
    assert len(read_ledger(run / "skipped.jsonl")) > LAST_STEP / 2
    return run


def ended(process):
    process.join(300)
    return process.exitcode


def wait_until(process, happened, seconds=300):
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.is_alive(), "the run ended before the moment came"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.0002)


def metrics(run):
    """The numbers of each line, without those that tell how fast it was."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def steps(run):
    return [line["step"] for line in metrics(run)]


def assert_same_bits(run, whole):
    files = [WEIGHTS, "skipped.jsonl", *(f"checkpoints/step_{step:08d}" for step in (145, 150))]
    for name in files:
        parts = [name] if (whole / name).is_file() else [f"{name}/{file.name}" for file in (whole / name).iterdir()]
        for part in parts:
            assert (run / part).read_bytes() == (whole / part).read_bytes(), part
    assert metrics(run) == metrics(whole)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000145", "step_00000150"]


def checkpoint_after(run, step):
    return lambda: any(int(p.name[5:]) >= step for p in (run / "checkpoints").glob("step_*"))


def half_written(folder, pattern):
    return lambda: any(folder.glob(pattern))


def test_kill_9_at_any_moment_changes_nothing(begin, whole, tmp_path):
    run = tmp_path / "run"
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
        process = begin(run)
        wait_until(process, happened)
        process.kill()
        assert ended(process) == -signal.SIGKILL, moment
    assert ended(begin(run)) == 0
    assert_same_bits(run, whole)


def test_kill_9_at_ten_random_points_changes_nothing(begin, whole, tmp_path):
    seed = int(os.environ.get("SOFTMOE_CLIP_TEST_SEED") or random.randrange(2**32))
    print(f"SOFTMOE_CLIP_TEST_SEED={seed} repeats these points")  # shown when the test fails
    draw, run, num_killed = random.Random(seed), tmp_path / "run", 0
    for number in range(10):
        if number % 2:  # at a random time
            process = begin(run)
            before = steps_so_far(run)
            wait_until(process, lambda: steps_so_far(run) != before)  # noqa: B023
            time.sleep(draw.uniform(0, 0.5))
            process.kill()
        else:  # just before a random one of the operations that write checkpoints, models and logs
            process = begin(run, dies_at=(str(run), draw.randint(1, 120)))
        assert ended(process) in (-signal.SIGKILL, 0)
        num_killed += process.exitcode != 0
    assert num_killed >= 8
    assert ended(begin(run)) == 0
    assert_same_bits(run, whole)


def test_sigterm_and_ctrl_c_save_the_state_and_say_so_in_one_line(begin, whole, tmp_path):
    run = tmp_path / "run"
    going_on = 0
    for number, until in ((signal.SIGTERM, 23), (signal.SIGINT, 60)):
        process = begin(run)
        wait_until(process, lambda: (run / "metrics.jsonl").exists() and len(steps_so_far(run)) >= until)  # noqa: B023
        # Ctrl-C in a terminal reaches the loader's processes as well; a scheduler's SIGTERM only the one it started.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert ended(process) == 75
        told = run.with_suffix(".txt").read_text().splitlines()
        stopped_after = int(max((run / "checkpoints").glob("step_*")).name[5:])
        assert stopped_after >= until
        stop = f"stopped after step {stopped_after} of {LAST_STEP}; start the same command again to go on"
        assert told[-1] == stop
        assert told[1:-1] == ([f"going on after step {going_on} of {LAST_STEP}"] if going_on else [])
        going_on = stopped_after
    assert ended(begin(run)) == 0
    assert_same_bits(run, whole)


def test_a_second_start_in_the_same_folder_is_refused_and_the_first_goes_on(begin, whole, tmp_path):
    run = tmp_path / "run"
    first, told = begin(run), run.with_suffix(".txt")
    wait_until(first, lambda: len(steps_so_far(run)) >= 3)
    told.rename(tmp_path / "first.txt")
    assert ended(begin(run)) == 2
    sentence = f"another process is training in {run} right now: wait for it, or give another folder as out"
    assert told.read_text().splitlines()[-1] == f"softmoe-clip: {sentence}"
    first.kill()  # the lock dies with it, though its worker lives on for a moment
    assert ended(first) == -signal.SIGKILL
    assert ended(begin(run)) == 0
    assert_same_bits(run, whole)


def steps_so_far(run):
    """All whole lines; the last one may just be written."""
    file = run / "metrics.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def test_a_full_disk_stops_a_run_in_one_line_and_it_goes_on_afterwards(begin, tmp_path):
    run, settings = tmp_path / "run", "optim.schedule=constant"
    assert ended(begin(run, settings, "steps=10")) == 0
    before = (run / WEIGHTS).read_bytes()
    assert ended(begin(run, settings, "steps=20", largest_file=len(before) // 2)) == 2
    told = run.with_suffix(".txt").read_text()
    assert told.splitlines()[-1].startswith("softmoe-clip: no space left while writing ")
    assert "Traceback" not in told
    assert (run / WEIGHTS).read_bytes() == before
    assert not list(run.glob("**/.*"))
    assert ended(begin(run, settings, "steps=20")) == 0
    assert steps(run) == [*range(1, 21)]
