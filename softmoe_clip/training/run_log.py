"""What a run leaves to read: metrics.jsonl, TensorBoard, versions; cut back to the checkpoint when a run goes on."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

REPORTED_PACKAGES = ("softmoe-clip", "torch", "torchvision", "open-clip-torch", "timm", "accelerate", "numpy", "pillow")


class RunLog:
    """Append one line of numbers at a time to metrics.jsonl and TensorBoard, in a `with`; the main process has one."""

    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        cut_back(folder / "metrics.jsonl", first_step)
        self.lines = (folder / "metrics.jsonl").open("a")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, numbers: dict[str, int | float]) -> None:
        """Write the numbers of one step, at once, so that a kill loses nothing."""
        self.lines.write(json.dumps({"step": step, **numbers}) + "\n")
        self.lines.flush()
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        self.lines.close()
        self.board.close()


def cut_back(file: Path, last_step: int) -> None:
    """Drop lines of steps after `last_step`, and a line that a kill left unfinished."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("step", 0) <= last_step:
            kept.append(line + "\n")
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, file)


def environment() -> dict[str, object]:
    """Return what reproduces a run beside its config: versions, machine, threads, and the git commit, if any."""
    import torch

    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
        )
        commit = commit.stdout.strip() or None
    except OSError:
        commit = None
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in REPORTED_PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "git": commit,
    }
