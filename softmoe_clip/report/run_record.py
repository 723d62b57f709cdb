"""Read what a run folder tells about its training; whatever is missing is simply left out of the report."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from softmoe_clip.data_pipelines.ledger import read_ledger


class RunRecord(NamedTuple):
    """A run as written down by training: the exact YAML, a line per logged step, a line per evaluation, versions."""

    name: str
    config: str
    steps: list[dict]
    evaluations: list[dict]
    versions: dict


class Numbers(NamedTuple):
    """Metrics and the chance level of each, by name, with whatever else the evaluation noted (see eval.results)."""

    metrics: dict[str, float]
    chance: dict[str, float]
    meta: dict
    details: dict


def read_run(run: str | Path | None) -> RunRecord:
    """Read a run folder, or a model folder, or nothing (None): the record is then empty but for its name."""
    if run is None:
        return RunRecord("model", "", [], [], {})
    run = Path(run)
    config = run / "config.yaml"
    lines = read_lines(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if any(name.startswith(("val/", "eval/")) for name in line)]
    return RunRecord(
        run.resolve().name,
        config.read_text(encoding="utf-8") if config.exists() else "",
        steps,
        evaluations,
        read_json(run / "versions.json"),
    )


def read_lines(path: Path) -> list[dict]:
    """Read JSON lines about steps, without those that a kill or a bad copy damaged."""
    return [line for line in read_ledger(path) if "step" in line]


def read_json(path: Path) -> dict:
    """Read a JSON object; an absent file is an empty one, a damaged one a ValueError that names it."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no readable JSON ({error}): remove it or write it again") from None
    return found if isinstance(found, dict) else {}


def read_numbers(results: Any, run: str | Path | None = None) -> Numbers:
    """Take Results, or a dict like its JSON form, or a plain {name: value}; without any, all of RUN/eval/*.json."""
    if results is None:
        files = sorted((Path(run) / "eval").glob("*.json")) if run else []
        found = [read_numbers(read_json(path)) for path in files]
        merged = Numbers({}, {}, {}, {})
        for numbers in found:
            for into, more in zip(merged, numbers, strict=True):
                into.update(more)
        return merged
    if not isinstance(results, dict):
        results = asdict(results)
    metrics = results.get("metrics", results)
    rest = [results.get(name) or {} for name in ("chance", "meta", "details")]
    return Numbers(finite(metrics), finite(rest[0]), *rest[1:])


def finite(values: dict) -> dict[str, float]:
    """Keep the numbers that can be shown."""
    return {
        name: float(value) for name, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)
    }
