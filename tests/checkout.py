"""The checkout that is being tested: its files, and fresh copies of it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def checkout_files() -> list[Path]:
    """Return what git holds or would hold, relative to the root; the three links are files here. Skip without git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    return sorted(path for name in listed.stdout.split("\0")[:-1] if os.path.lexists(ROOT / (path := Path(name))))


def copy_checkout(folder: Path) -> Path:
    """Write a fresh copy of the checkout, with what is not committed yet and without what git ignores."""
    for path in checkout_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path, follow_symlinks=False)
    return folder


def outside_environment(**more: str) -> dict[str, str]:
    """Return the environment of somebody at a new prompt: nothing of this test run or of the `make` that started it."""
    ours = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "DATA", "OUT", "PYTHON")
    dropped = {*ours, "PYTHONPATH", "VIRTUAL_ENV", "SOFTMOE_CLIP_QUIET", "OMP_NUM_THREADS"}
    return {name: value for name, value in os.environ.items() if name not in dropped} | more
