"""What several runs logged, as curves that can be drawn side by side; reads nothing but their metrics.jsonl."""

import json
import math
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

XAxis = Literal["step", "samples_seen", "minutes"]
Series = tuple[np.ndarray, np.ndarray]
ALWAYS = ("loss", "val/loss")
NOW_AND_THEN = ("lr", "gradient_norm", "routing/dispatch_entropy", "routing/gate_entropy")
# Which of a suite's numbers are drawn unasked, most telling first.
TELLING = ("text_to_image/recall@1", "image_to_text/recall@1", "/top1", "/accuracy", "/recall@1")
MOST_TELLING = 4


class RunSeries(NamedTuple):
    """A run's name in the picture, and its curves by metric: places on the x axis, values."""

    name: str
    curves: dict[str, Series]


def read_runs(folders: Sequence[str | Path], x: XAxis) -> list[RunSeries]:
    """Read the curves of each run, named by the part that tells it from the others.

    Raises ValueError for a place without a run, and for one that has not logged anything yet.
    """
    places = list(dict.fromkeys(map(place_of, folders)))
    given = {place_of(folder): folder for folder in reversed(folders)}
    lines = [read_metrics(given[place]) for place in places]
    return [
        RunSeries(name, curves(found, x, given[place]))
        for name, found, place in zip(short_names(places), lines, places, strict=True)
    ]


def place_of(run: str | Path) -> Path:
    """Return what tells a run from others and gives it its name; that of a URL is no path to open."""
    return Path(run) if "://" in str(run) else Path(run).resolve()


def read_metrics(run: str | Path) -> list[dict]:
    """Read metrics.jsonl in a folder or at a URL; a damaged line is left out and told."""
    file = f"{str(run).rstrip('/')}/metrics.jsonl"
    texts = text_of(file, run).splitlines()
    entries = [entry for entry in map(line_of, texts) if entry is not None]
    if len(entries) < len(texts):
        print(f"{file}: {len(texts) - len(entries)} damaged line(s) left out", file=sys.stderr)
    if not entries:
        raise ValueError(f"{file} has no numbers yet")
    return sorted(entries, key=lambda entry: entry["step"])


def text_of(file: str, run: str | Path) -> str:
    """Return what is written in a file or at a URL; ValueError where there is no such thing."""
    if "://" not in file:
        if not Path(file).exists():
            inside = sorted(path.parent for path in Path(run).glob("*/metrics.jsonl"))
            hint = f"; did you mean {inside[0]}?" if inside else ""
            raise ValueError(f"{run} holds no run: there is no metrics.jsonl{hint}")
        return Path(file).read_text(encoding="utf-8", errors="replace")
    import fsspec

    try:
        with fsspec.open(file, "rt", encoding="utf-8", errors="replace") as opened:
            return opened.read()
    except FileNotFoundError:
        raise ValueError(f"{run} holds no run: there is no metrics.jsonl") from None
    except (ImportError, ValueError) as error:  # a protocol that is not known, or whose package is missing
        raise ValueError(f"{run} cannot be read: {' '.join(str(error).split())}") from None


def line_of(text: str) -> dict | None:
    """Return what a line holds, None where it was cut off or says no step."""
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and is_number(entry.get("step")) else None


def is_number(value: object) -> bool:
    """Return whether a value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curves(lines: list[dict], x: XAxis, run: str | Path) -> dict[str, Series]:
    """Sort a run's numbers by metric; `routing/<statistic>` is the mean over its layers."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        statistics: dict[str, list[float]] = {}
        for name, value in line.items():
            if name == "step" or not is_number(value):
                continue
            found.setdefault(name, []).append((line["step"], value))
            if name.startswith("routing/") and name.count("/") > 1:
                statistics.setdefault(name.rpartition("/")[2], []).append(value)
        for statistic, values in statistics.items():
            found.setdefault(f"routing/{statistic}", []).append((line["step"], float(np.mean(values))))
    place = place_of_steps(found, x, run)
    arrays = {name: np.array(points, float).T for name, points in found.items()}
    return {name: (place(steps), values) for name, (steps, values) in arrays.items()}


def place_of_steps(found: dict[str, list[tuple[float, float]]], x: XAxis, run: str | Path):
    """Return where a step stands on the x axis: also for lines that name only their step, by those around them."""
    if x == "step":
        return lambda steps: steps
    known = [(0.0, 0.0), *(found.get("samples_seen", []) if x == "samples_seen" else seconds(found))]
    if len(known) == 1:
        raise ValueError(f"{run} does not say where its steps stand in {x}: give --x step")
    at, places = np.array(known, float).T
    return lambda steps: np.interp(steps, at, places) / (60 if x == "minutes" else 1)


def seconds(found: dict[str, list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the seconds trained at each logged step; runs that did not log them logged pairs and their rate."""
    if "seconds" in found:
        return found["seconds"]
    rates, total, before, points = dict(found.get("pairs_per_second", [])), 0.0, 0.0, []
    for step, seen in found.get("samples_seen", []):
        if rates.get(step):
            total, before = total + (seen - before) / rates[step], seen
            points.append((step, total))
    return points


def short_names(folders: Sequence[Path]) -> list[str]:
    """Name each folder by the shortest end of its path that no other has, without what all end in."""
    parts = [list(folder.parts) for folder in folders]
    while len(parts) > 1 and all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def choose(runs: Sequence[RunSeries], asked: Sequence[str]) -> list[str]:
    """Return the metrics to draw: those asked for (`eval/*` is a pattern), else the telling ones that there are.

    Raises ValueError for one that no run has, with the nearest name.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    if not asked:
        evals = [name for name in names if name.startswith("eval/")]
        telling = [name for end in TELLING for name in evals if name.endswith(end)]
        wanted = [*ALWAYS, *list(dict.fromkeys(telling))[:MOST_TELLING], *NOW_AND_THEN]
        return [name for name in wanted if name in names]
    chosen: dict[str, None] = {}
    for name in asked:
        matching = [known for known in names if fnmatchcase(known, name)]
        if not matching:
            close = get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise ValueError(f"no run has logged {name!r}: {hint}")
        chosen |= dict.fromkeys(matching)
    return list(chosen)
