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
from torch import nn

from softmoe_clip.data_pipelines.new_folder import NO_SPACE, sync
from softmoe_clip.models.store import write_tensors
from softmoe_clip.moe.expert_parallel import OtherExperts
from softmoe_clip.training.expert_parallel import Mesh, load_shares, whole


class Progress(NamedTuple):
    """How far a run has come."""

    step: int
    samples_seen: int


class Whole(NamedTuple):
    """A model's state and its optimizer's, put together from several processes."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as tensors named `<parameter>|<entry>`, independent of group order."""
    return {
        f"{name}|{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh | None) -> Whole | None:
    """Put together, in the main process, what several hold; None where each holds all. All must call this together."""
    if mesh is None:
        return None
    states = model.state_dict(), optimizer_tensors(model, optimizer)
    return Whole(*(whole(state, model, mesh) for state in states))


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer, progress: Progress, keep_last: int, state: Whole | None = None
) -> Path:
    """Write `folder/step_00001000` under a temporary name, sync and rename it; keep the newest `keep_last`.

    `state` is given where this process holds only a part of the model.
    Raises OSError for a full disk; the older checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{progress.step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}"
    try:
        temporary.mkdir()
        weights, moments = state or (model.state_dict(), optimizer_tensors(model, optimizer))
        write_tensors(weights, temporary / "model.safetensors")
        write_tensors(moments, temporary / "optimizer.safetensors")
        (temporary / "progress.json").write_text(json.dumps(progress._asdict()))
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
    prune(folder, final, keep_last)
    return final


def prune(folder: Path, newest: Path, keep_last: int) -> None:
    """Keep the last checkpoints up to `newest`; what comes after it is damaged, or half-written by a killed process."""
    whole = sorted(path for path in folder.glob("step_*") if path.name <= newest.name)
    for old in {*folder.glob("step_*")} - {*whole[-keep_last:]}:
        shutil.rmtree(old)
    for half in folder.glob(".step_*"):
        shutil.rmtree(half, ignore_errors=True)


def load_newest(folder: Path, model: nn.Module, optimizer, warn) -> Progress:
    """Load the newest whole checkpoint into model and optimizer; a damaged one is named to `warn` and passed over.

    Raises ValueError when all are damaged, or belong to another model.
    """
    paths = sorted(folder.glob("step_*"), reverse=True)
    for path in paths:
        try:
            weights, moments = (load_shares(path / f"{name}.safetensors", model) for name in ("model", "optimizer"))
            progress = Progress(**json.loads((path / "progress.json").read_text()))
        except OtherExperts as error:
            raise another_model(path, error) from None
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
        raise another_model(path, error) from None
    optimizer.state.clear()
    for key, value in moments.items():
        name, entry = key.rsplit("|", 1)
        parameter = parameters[name]
        # AdamW's step counter stays where the optimizer made it: on the CPU, unless the optimizer is fused on a GPU.
        optimizer.state[parameter][entry] = value.to(parameter.device)


def another_model(path: Path, error: Exception) -> ValueError:
    """Say that a checkpoint is of another model, and in what."""
    return ValueError(
        f"{path} holds another model than the config describes ({' '.join(str(error).split())[:200]}): "
        "give another folder as out"
    )
