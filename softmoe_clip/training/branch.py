"""A run that branches off another: it goes on from one of its checkpoints with other settings, as for a cooldown."""

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.amp import GradScaler

from softmoe_clip.config import TrainConfig, flatten
from softmoe_clip.training.checkpoint import UNREADABLE, Progress, fill, read_checkpoint
from softmoe_clip.training.ema import Ema
from softmoe_clip.training.run_folder import as_tree, settings_of

# Of trunk and branch: what weights and the optimizer's state are made for.
MUST_AGREE = ("model.", "tokenizer", "loss", "optim.name", "optim.options", "lora.targets", "lora.rank")


def branch_point(config: TrainConfig) -> Path | None:
    """Return the checkpoint that `init` names, None where it names a model or nothing.

    By its name alone: a branch that has checkpoints of its own goes on after the trunk's have been removed.
    """
    is_checkpoint = config.init is not None and re.search(r"(^|/)step_\d{8}/?$", config.init)
    return Path(config.init) if is_checkpoint else None


def branch_off(
    config: TrainConfig,
    model: nn.Module,
    optimizer,
    ema: Ema | None,
    scaler: GradScaler | None,
    tell: Callable[[str], None],
) -> Progress | None:
    """Fill what is given as the trunk had it, and return how far it had come; None without a trunk.

    Steps, the schedule and the place in the data are counted from the trunk's beginning, so that the branch is what the
    trunk would have been under the branch's settings. `tell` hears where only one of the two keeps averages. Raises
    ValueError, one sentence, where that cannot be.
    """
    if (point := branch_point(config)) is None:
        return None
    check_trunk(point, config)
    try:
        state, progress = read_checkpoint(point, model)
    except UNREADABLE as error:
        raise ValueError(f"init: {point} cannot be read ({' '.join(str(error).split())})") from None
    if config.samples is not None and progress.samples_seen != progress.step * config.batch_size:
        raise ValueError(
            f"init: {point} has seen {progress.samples_seen:,} samples in {progress.step:,} steps, which are no steps "
            f"of batch_size={config.batch_size}: give the budget as steps, not as samples"
        )
    if config.last_step <= progress.step:
        raise ValueError(
            f"init: {point} has {progress.step} steps behind it, which count: give more than {config.last_step} steps"
        )
    fill(model, optimizer, state, point, scaler)
    if ema is not None:
        go_on_averaging(ema, model, state.averages or {})
    if ema is not None and state.averages is None:
        tell(f"{point} has no averaged weights: they begin as its weights")
    if ema is None and state.averages is not None:
        tell(f"{point} has averaged weights, which end here: ema is not set")
    return progress


def go_on_averaging(ema: Ema, model: nn.Module, before: dict[str, Tensor]) -> None:
    """Take over the averages of what the branch trains, too; those of anything else begin as its weights."""
    ema.begin(model)
    ema.fill(ema.averages | {name: average for name, average in before.items() if name in ema.averages})


def check_trunk(point: Path, config: TrainConfig) -> None:
    """Refuse a trunk with another model, tokenizer, kind of optimizer or adapters; all other settings may differ."""
    saved = point.parent.parent / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"init: {point} is no checkpoint in a run folder: there is no {saved}")
    trunk, branch = settings_of(saved.parent), flatten(as_tree(config))
    for key in sorted(trunk.keys() | branch.keys()):
        if key.startswith(MUST_AGREE) and trunk.get(key) != branch.get(key):
            raise ValueError(f"init: the run of {point} has {key}={trunk.get(key)!r}, not {branch.get(key)!r}")
