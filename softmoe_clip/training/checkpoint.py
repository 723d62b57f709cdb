"""Everything that makes the next step the same, written so that a kill at any moment leaves only whole checkpoints.

Dropout and the like draw from a generator seeded by (seed, step), so that no random state needs saving.
"""

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn


class Progress(NamedTuple):
    """How far a run has come."""

    step: int
    samples_seen: int


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as tensors named `<parameter>|<entry>`, independent of group order."""
    return {
        f"{name}|{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def save_checkpoint(folder: Path, model: nn.Module, optimizer, progress: Progress, keep_last: int) -> Path:
    """Write `folder/step_00001000` under a temporary name, sync and rename it; keep the newest `keep_last`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir()
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, temporary / "model.safetensors")
        save_file(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps(progress._asdict()))
        for file in [*temporary.iterdir(), temporary]:
            sync(file)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    prune(folder, keep_last)
    return final


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest checkpoints, and what a killed process left half-written."""
    for old in sorted(folder.glob("step_*"))[:-keep_last]:
        shutil.rmtree(old)
    for half in folder.glob(".step_*"):
        shutil.rmtree(half, ignore_errors=True)


def load_newest(folder: Path, model: nn.Module, optimizer, warn) -> Progress:
    """Load the newest whole checkpoint into model and optimizer; a damaged one is named to `warn` and passed over."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            return load_checkpoint(path, model, optimizer)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            warn(f"checkpoint {path} is damaged ({str(error).splitlines()[0]}); using the one before it")
    return Progress(step=0, samples_seen=0)


def load_checkpoint(path: Path, model: nn.Module, optimizer) -> Progress:
    """Load one checkpoint; nothing is changed unless all of its files can be read."""
    weights, moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    progress = Progress(**json.loads((path / "progress.json").read_text()))
    model.load_state_dict(weights)
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in moments.items():
        name, entry = key.rsplit("|", 1)
        parameter = parameters[name]
        # AdamW's step counter stays where the optimizer made it: on the CPU, unless the optimizer is fused on a GPU.
        optimizer.state[parameter][entry] = value.to(parameter.device)
    return progress


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint by name, 0 where there is none."""
    return max((int(path.name.removeprefix("step_")) for path in folder.glob("step_*")), default=0)
