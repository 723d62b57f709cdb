"""What a run leaves to read: metrics.jsonl, trackers, versions; cut back to the checkpoint when a run goes on."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softmoe_clip.data_pipelines.ledger import append_lines
from softmoe_clip.data_pipelines.new_folder import write_whole
from softmoe_clip.training.trackers import start_trackers

REPORTED_PACKAGES = ("softmoe-clip", "torch", "torchvision", "open-clip-torch", "timm", "accelerate", "numpy", "pillow")


class RunLog:
    """Append one line of numbers at a time to metrics.jsonl and the trackers, in a `with`; the main process has one.

    `lines_before` are those that the run wrote before, up to its checkpoint; `settings` are what trackers show of it.
    """

    def __init__(
        self,
        folder: Path,
        first_step: int,
        trackers: Sequence[str] = ("tensorboard",),
        settings: dict[str, Any] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "metrics.jsonl"
        self.lines_before = cut_back(self.file, first_step)
        self.file.touch()
        self.trackers = start_trackers(trackers, folder, first_step, settings or {})

    def write(self, step: int, numbers: dict[str, int | float]) -> None:
        """Write the numbers of one step; JSON has no NaN or infinity, but null.

        Gradient norms are none at a step that fp16 skips.
        """
        shown = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        append_lines(self.file, [json.dumps({"step": step, **shown})])
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def seconds_before(self) -> float:
        """Return how long the run had trained when it wrote its last line."""
        return max((line["seconds"] for line in self.lines_before if "seconds" in line), default=0.0)

    def has_measured(self, step: int) -> bool:
        """Return whether the run wrote before what it had measured after a step."""
        names = (name for line in self.lines_before if line.get("step") == step for name in line)
        return any(name.startswith(("val/", "eval/")) for name in names)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        for tracker in self.trackers:
            tracker.finish()


def cut_back(file: Path, last_step: int) -> list[dict[str, Any]]:
    """Drop lines of steps after `last_step`, and those that a kill or a bad copy damaged; return the others."""
    if not file.exists():
        return []
    kept, entries = [], []
    for line in file.read_bytes().splitlines():
        try:
            text = line.decode()
            entry = json.loads(text)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("step", 0) <= last_step:
            kept.append(text + "\n")
            entries.append(entry)
    write_whole(file, "".join(kept))
    return entries


def environment() -> dict[str, object]:
    """Return what reproduces a run beside its config: versions, machine, processes, threads, git commits, if any."""
    import torch

    package, here = git_state(Path(__file__)), git_state(Path.cwd())
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in REPORTED_PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "threads": torch.get_num_threads(),
        "git": package,  # of this program's checkout
        "git_here": here,  # of the folder in which the command was given
    }


def git_state(path: Path) -> str | None:
    """Return the commit that a file or folder belongs to, `-dirty` where it was changed since; None outside of git.

    A file must be known to git: an environment inside somebody's checkout is not a part of it.
    """
    folder = path if path.is_dir() else path.parent
    known = path.is_dir() or git(folder, "ls-files", path.name)
    return git(folder, "describe", "--always", "--dirty", "--abbrev=12") if known else None


def git(folder: Path, *arguments: str) -> str | None:
    """Return what a git command prints, None where it prints nothing, fails, or takes too long."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
