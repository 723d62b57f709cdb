"""Everything that makes the next step the same, written so that a kill at any moment leaves only whole checkpoints.

Dropout and the like draw from (seed, position), so that no random state needs saving.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor, nn

from softmoe_clip.data_pipelines.new_folder import NO_SPACE, sync
from softmoe_clip.models.store import write_tensors
from softmoe_clip.training.checksums import check_checksums, write_checksums
from softmoe_clip.training.ema import Ema
from softmoe_clip.training.optimizer_state import fill_optimizer, optimizer_tensors
from softmoe_clip.training.sharded_checkpoint import is_in_parts, read_parts, read_shares, write_parts
from softmoe_clip.training.sharding import is_sharded

EMA_FILE = "ema.safetensors"


class Progress(NamedTuple):
    """How far a run has come."""

    step: int
    samples_seen: int


def write_shards(folder: Path, model: nn.Module, optimizer, step: int, ema: Ema | None = None) -> Path | None:
    """Let each process of a sharded run write its part of a checkpoint, and return where `save_checkpoint` finds them.

    None where every process has the whole state, which the main one then writes. All processes must call this together.
    """
    if not is_sharded(model):
        return None
    temporary = folder / f".{folder_name(step)}.parts"
    averages = {} if ema is None else {"ema": ema.averages}
    states = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer), **averages}
    write_parts(temporary, states)
    return temporary


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer,
    progress: Progress,
    keep_last: int,
    keep_every: int = 0,
    ema: Ema | None = None,
    shards: Path | None = None,
) -> Path:
    """Write `folder/step_00001000` under a temporary name, sync and rename it; then remove what need not be kept.

    `shards` is what `write_shards` returned. Raises OSError for a full disk; the older checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / folder_name(progress.step)
    temporary = shards or folder / f".{final.name}.{os.getpid()}"
    try:
        if shards is None:
            temporary.mkdir()
            write_tensors(model.state_dict(), temporary / "model.safetensors")
            write_tensors(optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
            if ema is not None:
                write_tensors(ema.averages, temporary / EMA_FILE)
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


def load_newest(folder: Path, model: nn.Module, optimizer, warn, ema: Ema | None = None) -> Progress:
    """Load the newest whole checkpoint into model and optimizer; a damaged one is named to `warn` and passed over.

    Raises ValueError when all are damaged, or belong to another model.
    """
    paths = sorted(folder.glob("step_*"), reverse=True)
    for path in paths:
        try:
            parts = read_checkpoint(path, model)
            if ema is not None and parts.averages is None:
                raise ValueError(f"it holds no {EMA_FILE}")
        except UNREADABLE as error:
            warn(f"checkpoint {path} is damaged ({' '.join(str(error).split())})")
            continue
        fill(model, optimizer, parts, path)
        if ema is not None:
            ema.fill(parts.averages)
        return parts.progress
    if paths:
        raise ValueError(f"no checkpoint in {folder} can be read: remove that folder to begin the run anew")
    return Progress(step=0, samples_seen=0)


class Parts(NamedTuple):
    """What a checkpoint holds."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    averages: dict[str, Tensor] | None
    progress: Progress


UNREADABLE = (SafetensorError, OSError, ValueError, TypeError)


def read_checkpoint(path: Path, model: nn.Module) -> Parts:
    """Read a checkpoint's files, of a sharded model its share; raises one of UNREADABLE for a damaged one."""
    check_checksums(path)
    if is_in_parts(path):
        states = read_parts(path, model)
        weights, moments, averages = states["model"], states.get("optimizer", {}), states.get("ema")
    else:
        weights, moments = (read_shares(path / f"{name}.safetensors", model) for name in ("model", "optimizer"))
        averages = read_shares(path / EMA_FILE, model) if (path / EMA_FILE).exists() else None
    return Parts(weights, moments, averages, Progress(**json.loads((path / "progress.json").read_text())))


def fill(model: nn.Module, optimizer, parts: Parts, path: Path) -> None:
    """Put a checkpoint's tensors into model and optimizer; refuse those of another model."""
    try:
        fill_optimizer(model, optimizer, parts.moments)
        model.load_state_dict(parts.weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds another model than the config describes ({' '.join(str(error).split())[:200]}): "
            "give another folder as out"
        ) from None
