"""Run the tasks of a suite with one encoder and put their numbers together."""

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softmoe_clip.eval.caption_pairs import caption_pairs
from softmoe_clip.eval.class_folders import open_data
from softmoe_clip.eval.config import SuiteConfig, TaskConfig, load_suite
from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.eval.results import Results
from softmoe_clip.eval.retrieval import retrieval
from softmoe_clip.eval.zero_shot import words_of, zero_shot

__all__ = ["TASKS", "SuiteConfig", "TaskConfig", "check_suite", "load_suite", "run_suite"]

TASKS = {
    "zero_shot": zero_shot,
    "retrieval": retrieval,
    "relations": caption_pairs,
    "counting": caption_pairs,
    "negation": caption_pairs,
}
VERSIONS = ("softmoe-clip", "torch", "open-clip-torch", "timm", "numpy")
TIES = (
    "scores closer than 1e-6 are ties; a metric is its expectation over random orders of what is tied, "
    "a median rank the median over these orders, too"
)


def check_suite(suite: SuiteConfig) -> None:
    """Refuse data that cannot be opened, class names and templates that are not there, before anything is computed."""
    for task in suite.tasks:
        data = open_data(suite.place(task.data))
        if task.kind == "zero_shot":
            words_of(task, suite, data)


def run_suite(encoder: Encoder, suite: SuiteConfig | str | Path, model_name: str = "") -> Results:
    """Run every task; metrics are named `kind/name/metric`, with the same keys in `chance`."""
    suite = suite if isinstance(suite, SuiteConfig) else load_suite(suite)
    metrics, chance, details, counts = {}, {}, {}, {}
    for task in suite.tasks:
        found, name = TASKS[task.kind](encoder, task, suite), f"{task.kind}/{task.name}"
        metrics |= {f"{name}/{key}": value for key, value in found.metrics.items()}
        chance |= {f"{name}/{key}": value for key, value in found.chance.items()}
        counts[name] = {**found.meta, "data": task.data, "skipped": described(found.meta["skipped"])}
        if found.details:
            details[name] = found.details
    meta = {
        "model": model_name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in VERSIONS},
        "device": str(encoder.device),
        "precision": encoder.precision,
        "ties": TIES,
        "tasks": counts,
    }
    return Results(metrics, chance, meta, details)


def described(skipped: Sequence[Any]) -> list[dict[str, str]]:
    """List the pictures that could not be read, with key, shard and reason."""
    return [{"key": bad.key, "shard": bad.shard, "reason": str(bad.reason)} for bad in skipped]
