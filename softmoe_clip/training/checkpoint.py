"""Everything that makes the next step the same, written so that a kill at any moment leaves only whole checkpoints.

Dropout and the like draw from (seed, position), so that no random state needs saving.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from softmoe_clip.data_pipelines.new_folder import NO_SPACE, sync
from softmoe_clip.models.store import write_tensors
from softmoe_clip.training.checksums import check_checksums, write_checksums


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


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer, progress: Progress, keep_last: int, keep_every: int = 0
) -> Path:
    """Write `folder/step_00001000` under a temporary name, sync and rename it; then remove what need not be kept.

    Raises OSError for a full disk; the older checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / folder_name(progress.step)
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir()
        write_tensors(model.state_dict(), temporary / "model.safetensors")
        write_tensors(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps(progress._asdict()))
        write_checksums(temporary)
        for file in [*temporary.iterdir(), temporary]:
            sync(file)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise OSError(
                f"no space left while writing {final}: free some and start the same command again to go on"
            ) from error
        raise
    prune(folder, progress.step, keep_last, keep_every)
    return final


def folder_name(step: int) -> str:
    """Name the folder of the checkpoint after a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the step that a checkpoint's folder name tells."""
    return int(name.removeprefix("step_"))


def kept(steps: Iterable[int], keep_last: int, keep_every: int) -> set[int]:
    """Return which checkpoints stay: the newest `keep_last`, and for good those at multiples of `keep_every` steps."""
    steps = sorted(steps)
    return {*steps[-keep_last:], *(step for step in steps if keep_every and step % keep_every == 0)}


def prune(folder: Path, newest: int, keep_last: int, keep_every: int = 0) -> None:
    """Remove old checkpoints; what comes after the newest is damaged, or half-written by a killed process."""
    steps = {path: step_of(path.name) for path in folder.glob("step_*")}
    stay = kept((step for step in steps.values() if step <= newest), keep_last, keep_every)
    for path, step in steps.items():
        if step not in stay:
            shutil.rmtree(path)
    for half in folder.glob(".step_*"):
        shutil.rmtree(half, ignore_errors=True)


def load_newest(folder: Path, model: nn.Module, optimizer, warn) -> Progress:
    """Load the newest whole checkpoint into model and optimizer; a damaged one is named to `warn` and passed over.

    Raises ValueError when all are damaged, or belong to another model.
    """
    paths = sorted(folder.glob("step_*"), reverse=True)
    for path in paths:
        try:
            check_checksums(path)
            weights, moments = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
            progress = Progress(**json.loads((path / "progress.json").read_text()))
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            warn(f"checkpoint {path} is damaged ({' '.join(str(error).split())})")
            continue
        fill(model, optimizer, weights, moments, path)
        return progress
    if paths:
        raise ValueError(f"no checkpoint in {folder} can be read: remove that folder to begin the run anew")
    return Progress(step=0, samples_seen=0)


def fill(model: nn.Module, optimizer, weights: dict, moments: dict, path: Path) -> None:
    """Put a checkpoint's tensors into model and optimizer; refuse those of another model."""
    parameters = dict(model.named_parameters())
    strangers = {key.rsplit("|", 1)[0] for key in moments} - parameters.keys()
    try:
        if strangers:
            raise RuntimeError(f"no parameter is called {min(strangers)}")
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds another model than the config describes ({' '.join(str(error).split())[:200]}): "
            "give another folder as out"
        ) from None
    optimizer.state.clear()
    for key, value in moments.items():
        name, entry = key.rsplit("|", 1)
        parameter = parameters[name]
        # AdamW's step counter stays where the optimizer made it: on the CPU, unless the optimizer is fused on a GPU.
        optimizer.state[parameter][entry] = value.to(parameter.device)
