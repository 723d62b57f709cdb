"""Where numbers go beside metrics.jsonl: TensorBoard, wandb and whatever else Accelerate has a tracker for."""

import os
import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from softmoe_clip.config import flatten

PROJECT = "softmoe-clip"
# Tracker: the package that it needs. Those of our own extras are `softmoe-clip[...]`.
PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet-ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
EXTRAS = ("wandb",)


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse a tracker whose package is not there, before a run begins."""
    for name in trackers:
        if find_spec(name) is None:
            package = f"softmoe-clip[{name}]" if name in EXTRAS else PACKAGES[name]
            raise ValueError(
                f'trackers: {name} is not installed: pip install "{package}", or leave it out; '
                "metrics.jsonl has the same numbers"
            )


def start_trackers(trackers: Sequence[str], run: Path, first_step: int, settings: dict[str, Any]) -> list:
    """Start Accelerate's trackers, each where the run's last checkpoint was.

    TensorBoard cuts back what comes after `first_step`, wandb goes on in the same run; the others begin a new one.
    """
    check_trackers(trackers)
    # Accelerate is slow to import, and its trackers are used without an Accelerator: a log needs no device.
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return [start(name, LOGGER_TYPE_TO_CLASS[name], run, first_step, settings) for name in trackers]


def start(name: str, tracker_class: type, run: Path, first_step: int, settings: dict[str, Any]) -> Any:
    """Start one tracker and give it the run's settings; whatever goes wrong there becomes one sentence."""
    try:
        if name == "tensorboard":
            tracker = tracker_class(name, run, purge_step=first_step + 1)
        else:
            folder = [run] if tracker_class.requires_logging_directory else []
            tracker = tracker_class(os.environ.get("WANDB_PROJECT", PROJECT), *folder, **own_settings(name, run))
        tracker.start()
        if settings and name != "tensorboard":  # there it would write a second event file, and nothing to read
            tracker.store_init_configuration({key: as_scalar(value) for key, value in flatten(settings).items()})
    except Exception as error:  # every service has errors of its own: no login, no network, no permission
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"trackers: {name} did not start ({reason}): mend that, or leave it out") from None
    return tracker


def own_settings(name: str, run: Path) -> dict[str, Any]:
    """Return what lets a service know this run again when it goes on."""
    if name != "wandb":
        return {}
    noted = run / "wandb_run_id.txt"  # beside config.yaml: of a run at a URL another machine fetches what lies there
    if not noted.exists():
        noted.write_text(f"{secrets.token_hex(4)}\n")
    return {"name": run.resolve().name, "dir": str(run), "id": noted.read_text().strip(), "resume": "allow"}


def as_scalar(value: Any) -> str | int | float | bool | None:
    """Return a setting in a form that every service takes."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
