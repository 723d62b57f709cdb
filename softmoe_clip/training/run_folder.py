"""A run folder: begun once with its config, gone on with only under a config that makes the same run."""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from softmoe_clip.config import MAY_CHANGE_AT_RESUME, MAY_MOVE_AT_RESUME, ModelConfig, TrainConfig, flatten
from softmoe_clip.data_pipelines.config import DataConfig
from softmoe_clip.data_pipelines.new_folder import write_whole
from softmoe_clip.data_pipelines.strict import read_yaml
from softmoe_clip.data_pipelines.train_set import in_words
from softmoe_clip.training.inputs import differences_of, fingerprints
from softmoe_clip.training.run_lock import LOCK_FILE, RunLock
from softmoe_clip.training.run_log import environment

CHECKPOINT_NAME = re.compile("step_([0-9]+)")


class Stopped(Exception):
    """The run was asked to stop, has saved its state, and goes on when it is started again."""


def say(text: str) -> None:
    """Print one line for a person, on stderr, so that stdout stays for results."""
    print(text, file=sys.stderr, flush=True)


def as_tree(config: TrainConfig) -> dict:
    """Return a config as plain nested dictionaries and lists, as they stand in config.yaml."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def begin(run: Path, config: TrainConfig, shards, preprocess: dict) -> RunLock:
    """Write config.yaml and what else reproduces the run, or check that the run there is this one; return its lock.

    `preprocess` is how pictures are prepared for its model: that of `init`, which may be gone when the run goes on.
    """
    saved = run / "config.yaml"
    # config.yaml comes last: a process that is killed here leaves a folder that can still be begun.
    before_config = {"versions.json", "versions.json.tmp", "config.yaml.tmp", LOCK_FILE}
    goes_on = saved.exists() and newest_step(run) > 0  # without a checkpoint there is nothing to be true to
    if goes_on:
        refuse_another_run(run, config, shards.fingerprint(), len(shards.counts))
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file: give a folder as out")
    if run.exists() and not saved.exists() and any(path.name not in before_config for path in run.iterdir()):
        raise ValueError(f"{run} holds files but no run (no config.yaml): give another folder as out")
    now, inputs = environment(), fingerprints(config)
    if goes_on:
        facts = read_facts(run)
        refuse_other_inputs(run, facts.get("inputs", {}), inputs)
        note_changes(run, facts, now)
    else:
        begun = {"begun": datetime.now(UTC).isoformat()}  # tells this run from an earlier one at the same URL
        data = {"data": shards.fingerprint(), "pairs": len(shards), "preprocess_cfg": preprocess}
        facts = now | begun | data | {"inputs": inputs}
    run.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run)
    write_whole(run / "versions.json", json.dumps(facts, indent=2) + "\n")
    write_whole(saved, OmegaConf.to_yaml(OmegaConf.create(as_tree(config))))
    return lock


def seen_by_run(run: Path) -> dict:
    """Return how pictures are prepared for the model of a run; runs from before that was written down had the usual."""
    return read_facts(run).get("preprocess_cfg", {}) if (run / "versions.json").exists() else {}


def read_facts(run: Path) -> dict:
    """Return what versions.json tells; one that is missing or damaged is refused."""
    file = run / "versions.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise unusable(file) from None
    if not isinstance(facts, dict) or "data" not in facts:
        raise unusable(file)
    return facts


def unusable(file: Path) -> ValueError:
    """Say that a file which every run has is not there, or is not what a run writes."""
    state = "damaged" if file.exists() else "missing"
    return ValueError(f"{file} is {state}: copy the run again, or give another folder")


def note_changes(run: Path, facts: dict, now: dict) -> None:
    """Say what is not as it was when the run began, and add it to its facts: the last bits may differ from there on."""
    changed = {name: value for name, value in now.items() if name in facts and facts[name] != value}
    told = {name: value for name, value in changed.items() if name != "git_here"}  # the user's own work: no bit of ours
    if told.keys() == {"threads"}:
        say(f"this run began with {facts['threads']} threads, now {now['threads']}: the last bits will differ")
    elif told:
        then = ", ".join(f"{name} {facts[name]} (now {value})" for name, value in told.items())
        say(f"this run began with {then}: the last bits may differ")
    if changed and (not facts.get("later") or facts["later"][-1] != {"after_step": newest_step(run)} | changed):
        facts.setdefault("later", []).append({"after_step": newest_step(run)} | changed)


def refuse_other_inputs(run: Path, before: dict, now: dict) -> None:
    """Refuse files that say other things than when the run began, under the same names."""
    if differences := differences_of(before, now):
        raise ValueError(
            f"{run} was begun with other files than are there now ({'; '.join(differences)}): "
            "give another folder as out"
        )


def refuse_another_run(run: Path, config: TrainConfig, fingerprint: str, num_shards: int = 0) -> None:
    """Refuse to go on under a config or data that would make another run, naming each difference."""
    now = flatten(as_tree(config))
    # Runs that knew no windows mixed all shards; a window that holds them all is the same order.
    one_window = now["data.window"] == 0 or num_shards <= now["data.window"]
    before = settings_of(run, {"data.window": now["data.window"] if one_window else 0})
    differences = [
        f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if is_other(key, before.get(key), now.get(key))
    ]
    for rules in ("optim.weight_decay.", "optim.lr_scale."):  # the first that matches wins
        then, here = ([key for key in settings if key.startswith(rules)] for settings in (before, now))
        if then != here and sorted(then) == sorted(here):
            differences.append(f"{rules[:-1]}: its rules stood in another order then")
    if differences:
        raise ValueError(f"{run} was begun with other settings ({'; '.join(differences)}): give another folder as out")
    if read_facts(run)["data"] != fingerprint:
        raise ValueError(
            f"{run} was begun with other data than {in_words(config.data)} holds now: give another folder as out"
        )


def is_other(key: str, before: Any, now: Any) -> bool:
    """Tell a setting that makes another run from one that may change, and from a folder that was moved."""
    if before == now or key.startswith(MAY_CHANGE_AT_RESUME):
        return False
    return key not in MAY_MOVE_AT_RESUME or without_folders(before) != without_folders(now)


def without_folders(value: Any) -> Any:
    """Replace each path of this machine in a setting; `open_clip`, URLs and commands are none."""
    if isinstance(value, list | tuple):
        return [without_folders(part) for part in value]
    if isinstance(value, dict):
        return {name: without_folders(part) for name, part in value.items()}
    is_path = isinstance(value, str) and value != "open_clip" and "://" not in value and "pipe:" not in value
    return Path if is_path else value


def settings_of(run: Path, unknown: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return a run's settings by dotted name; one that it did not know yet as `unknown` says, else its default."""
    file = run / "config.yaml"
    try:
        tree = read_yaml(file)
    except ValueError:
        raise unusable(file) from None
    if not {"out", "model", "data"} <= tree.keys():  # they have no default, so that every run wrote them
        raise unusable(file)
    saved = flatten(tree)
    defaults = flatten(as_tree(TrainConfig("", ModelConfig(""), DataConfig("any"), steps=1)))
    rules = "optim.weight_decay."  # a run with rules of its own has none of the others
    if "weight_decay" in tree.get("optim", {}):
        defaults = {key: value for key, value in defaults.items() if not key.startswith(rules)}
    return defaults | dict(unknown) | saved


def is_finished(run: Path, config: TrainConfig) -> bool:
    """Return whether the run in this folder has reached its last step and has its models.

    They are written before the last checkpoint, whose name is enough: whether it is whole is seen when it is read.
    """
    from softmoe_clip.models.store import CONFIG_FILE, WEIGHTS_FILE

    files = [run / folder / name for folder in model_folders(config) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    if newest_step(run) < config.last_step or not all(file.exists() for file in files):
        return False
    refuse_another_run(run, config, read_facts(run)["data"])
    return True


def model_folders(config: TrainConfig) -> list[str]:
    """Name the model folders that a run leaves."""
    return ["model"] if config.ema is None else ["model", "model_ema"]


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint by name, 0 where there is none."""
    return max(checkpoints_in(run / "checkpoints").values(), default=0)


def checkpoints_in(folder: Path) -> dict[Path, int]:
    """Return the checkpoints in a folder with their steps, by name; what has any other name is somebody else's."""
    names = ((path, CHECKPOINT_NAME.fullmatch(path.name)) for path in folder.glob("step_*"))
    return {path: int(name[1]) for path, name in names if name}
