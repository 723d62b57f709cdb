"""Time several things on a noisy machine: each in a process of its own, one step each in turn, medians compared."""

import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from time import sleep

from softmoe_clip.launch import CPU_MEMORY

WARM_ROUNDS = 2
TUNED, PLAIN = "tuned", "plain"


def take_turns(contestants: list[tuple[str, str]], rounds: int) -> dict[tuple[str, str], float]:
    """Start this program once for each (name, memory) with `--work-on name`; return median seconds of a step.

    `memory` is plain, or tuned: kept from step to step, as `softmoe-clip train` keeps it on a CPU. A process
    that ends before its first step is left out: it has said why on stderr.
    """
    workers = {key: start(*key) for key in contestants}
    workers = {key: worker for key, worker in workers.items() if worker.stdout.readline() == "ready\n"}
    seconds = {key: [] for key in workers}
    for number in range(WARM_ROUNDS + rounds):
        for key, worker in workers.items():
            seconds[key].append(ask(worker))
            sleep(0.05)  # until the threads of this one no longer spin
        print(f"round {number + 1} of {WARM_ROUNDS + rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return {key: median(times[WARM_ROUNDS:]) for key, times in seconds.items()}


def start(name: str, memory: str) -> subprocess.Popen:
    """Start the process of one contestant."""
    environment = {key: value for key, value in os.environ.items() if key not in CPU_MEMORY}
    return subprocess.Popen(
        [sys.executable, *sys.argv, "--work-on", name],
        env=environment | (CPU_MEMORY if memory == TUNED else {}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(worker: subprocess.Popen) -> float:
    """Let a process take one step and return its seconds."""
    worker.stdin.write("step\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def serve(step: Callable[[], float]) -> None:
    """In a contestant's process: take a step for every line that comes, and answer with its seconds."""
    print("ready", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)
