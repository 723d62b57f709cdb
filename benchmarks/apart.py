"""Train runs of a benchmark apart: each with one thread in a process of its own, as many at once as there are cores."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev


def train_apart(run: str, log: Path) -> None:
    """Start this program once more with `--train RUN`, and wait; what it prints goes into the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *sys.argv, "--train", run]
    with log.open("w") as output:
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=output, stderr=output, env=alone, check=False)
    if done.returncode:
        raise SystemExit(f"{run} stopped: {log} says why. The same command goes on from there")


def merged(tree: dict, changes: dict) -> dict:
    """Return the tree with the changes in it, key by key."""
    return tree | {
        key: merged(tree[key], value) if isinstance(tree.get(key), dict) and isinstance(value, dict) else value
        for key, value in changes.items()
    }


def with_spread(values: Sequence[float]) -> str:
    """Write mean and standard deviation over seeds."""
    return f"{mean(values):.1f} ± {stdev(values) if len(values) > 1 else 0:.1f}"
