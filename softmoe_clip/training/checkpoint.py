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
from torch.amp import GradScaler

from softmoe_clip.data_pipelines.full_disk import GO_ON, raise_if_full
from softmoe_clip.data_pipelines.new_folder import sync
from softmoe_clip.models.alike import differences, shapes_of
from softmoe_clip.models.store import write_tensors
from softmoe_clip.moe.expert_parallel import OtherExperts, spread_parameters
from softmoe_clip.training.checksums import check_checksums, write_checksums
from softmoe_clip.training.ema import Ema
from softmoe_clip.training.expert_parallel import Mesh, gather_experts, load_shares
from softmoe_clip.training.lora import merged_weights
from softmoe_clip.training.optimizer_state import fill_optimizer, optimizer_tensors
from softmoe_clip.training.run_folder import CHECKPOINT_NAME, checkpoints_in
from softmoe_clip.training.sharded_checkpoint import is_in_parts, read_parts, read_shares, write_parts
from softmoe_clip.training.sharding import gather_shares, is_sharded

EMA_FILE = "ema.safetensors"
LOSS_SCALE_FILE = "loss_scale.json"


class Progress(NamedTuple):
    """How far a run has come."""

    step: int
    samples_seen: int


class State(NamedTuple):
    """What a checkpoint holds: weights, the optimizer's moments, averages of the weights and fp16's loss scale, if any.

    A loss scale is the state of torch's GradScaler; it is the same in all processes, as are the steps it skips.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    averages: dict[str, Tensor] | None
    loss_scale: dict[str, float] | None = None


def state_of(model: nn.Module, optimizer, ema: Ema | None, mesh: Mesh | None = None) -> State:
    """Return the state of a run; that of spread experts is whole in the main process, and all must call this together.

    What every process has in full is not copied.
    """
    averages = {} if ema is None else ema.averages
    states = model.state_dict(), optimizer_tensors(model, optimizer), averages
    weights, moments, averages = (gather_experts(state, model, mesh) for state in states)
    return State(weights, moments, None if ema is None else averages)


def whole_weights(model: nn.Module, mesh: Mesh | None, keep: bool) -> dict[str, Tensor]:
    """Return the weights of a model folder, put together where they lie in several processes, for who keeps them.

    All processes must call this together.
    """
    weights = merged_weights(model)
    return gather_shares(weights, keep) if is_sharded(model) else gather_experts(weights, model, mesh)


def shared_state(
    folder: Path, model: nn.Module, optimizer, step: int, ema: Ema | None, mesh: Mesh | None
) -> State | Path | None:
    """Collect what the main process does not have itself, for `save_checkpoint`; all must call this together.

    None where it has all; spread experts are put together; of a sharded run each process writes its part into a folder.
    """
    if not is_sharded(model):
        return None if mesh is None else state_of(model, optimizer, ema, mesh)
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
    shared: State | Path | None = None,
    scaler: GradScaler | None = None,
) -> Path:
    """Write `folder/step_00001000` under a temporary name, sync and rename it; then remove what need not be kept.

    `shared` is what `shared_state` returned, where this process holds only a part of the model.
    Raises OSError for a full disk; the older checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / folder_name(progress.step)
    temporary = shared if isinstance(shared, Path) else folder / f".{final.name}.{os.getpid()}"
    try:
        if not isinstance(shared, Path):
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same number
            temporary.mkdir()
            write_state(temporary, shared or state_of(model, optimizer, ema))
        (temporary / "progress.json").write_text(json.dumps(progress._asdict()))
        if scaler is not None:
            (temporary / LOSS_SCALE_FILE).write_text(json.dumps(scaler.state_dict()))
        write_checksums(temporary)
        for file in [*temporary.iterdir(), temporary]:
            sync(file)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise_if_full(error, final, GO_ON)
        raise
    prune(folder, progress.step, keep_last, keep_every)
    return final


def write_state(folder: Path, state: State) -> None:
    """Write whole tensors."""
    write_tensors(state.weights, folder / "model.safetensors")
    write_tensors(state.moments, folder / "optimizer.safetensors")
    if state.averages is not None:
        write_tensors(state.averages, folder / EMA_FILE)


def folder_name(step: int) -> str:
    """Name the folder of the checkpoint after a step."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """Return the step that a checkpoint's folder name tells; refuse any other name."""
    if not (found := CHECKPOINT_NAME.fullmatch(name)):
        raise ValueError(f"checkpoints/{name} is no checkpoint (step_ and digits): move it to another folder")
    return int(found[1])


def kept(steps: Iterable[int], keep_last: int, keep_every: int) -> set[int]:
    """Return which checkpoints stay: the newest `keep_last`, and for good those at multiples of `keep_every` steps."""
    steps = sorted(steps)
    return {*steps[-keep_last:], *(step for step in steps if keep_every and step % keep_every == 0)}


def prune(folder: Path, newest: int, keep_last: int, keep_every: int = 0) -> None:
    """Remove old checkpoints; what comes after the newest is damaged, or half-written by a killed process."""
    steps = checkpoints_in(folder)
    stay = kept((step for step in steps.values() if step <= newest), keep_last, keep_every)
    for path, step in steps.items():
        if step not in stay:
            shutil.rmtree(path)
    for half in folder.glob(".step_*"):
        shutil.rmtree(half, ignore_errors=True)


def load_newest(
    folder: Path, model: nn.Module, optimizer, warn, ema: Ema | None = None, scaler: GradScaler | None = None
) -> Progress:
    """Load the newest whole checkpoint into what is given; a damaged one is named to `warn` and passed over.

    Raises ValueError when all are damaged, or belong to another model.
    """
    paths = sorted(checkpoints_in(folder), reverse=True)
    for path in paths:
        try:
            state, progress = read_checkpoint(path, model)
            if ema is not None and state.averages is None:
                raise ValueError(f"it holds no {EMA_FILE}")
        except OtherExperts as error:
            raise another_model(path, error) from None
        except UNREADABLE as error:
            warn(f"checkpoint {path} is damaged ({' '.join(str(error).split())})")
            continue
        fill(model, optimizer, state, path, scaler)
        if ema is not None:
            ema.fill(state.averages)
        return progress
    if paths:
        raise ValueError(f"no checkpoint in {folder} can be read: remove that folder to begin the run anew")
    return Progress(step=0, samples_seen=0)


UNREADABLE = (SafetensorError, OSError, ValueError, TypeError)


def read_checkpoint(path: Path, model: nn.Module) -> tuple[State, Progress]:
    """Read a checkpoint's files, of what is spread or sharded this process's share; UNREADABLE for a damaged one."""
    check_checksums(path)
    progress = Progress(**json.loads((path / "progress.json").read_text()))
    if is_in_parts(path):
        if spread_parameters(model):
            raise OtherExperts("it is in parts, of sharding=full: write one with sharding=none first")
        states = read_parts(path, model)
        return State(states["model"], states.get("optimizer", {}), states.get("ema")), progress
    read = load_shares if spread_parameters(model) else read_shares
    weights, moments = (read(path / f"{name}.safetensors", model) for name in ("model", "optimizer"))
    averages = read(path / EMA_FILE, model) if (path / EMA_FILE).exists() else None
    file = path / LOSS_SCALE_FILE
    return State(weights, moments, averages, json.loads(file.read_text()) if file.exists() else None), progress


def fill(model: nn.Module, optimizer, state: State, path: Path, scaler: GradScaler | None = None) -> None:
    """Put a checkpoint's state into model, optimizer and scaler; refuse what is not of this model.

    A checkpoint of another precision, or from before loss scales were kept, lets the scale begin anew.
    """
    try:
        fill_optimizer(model, optimizer, state.moments)
        model.load_state_dict(state.weights)
        if scaler is not None and state.loss_scale is not None:
            scaler.load_state_dict(state.loss_scale)
    except RuntimeError as error:
        different = differences(shapes_of(model.state_dict()), shapes_of(state.weights))
        raise another_model(path, different or error) from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be gone on from, as {error}: use an older checkpoint") from None


def another_model(path: Path, error: Exception | str) -> ValueError:
    """Say that a checkpoint is of another model, and in what."""
    return ValueError(
        f"{path} holds another model than the config describes ({' '.join(str(error).split())[:200]}): "
        "give another folder as out"
    )
