"""What an evaluation found: numbers with their chance levels, saved as JSON and printed as tables."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from softmoe_clip.data_pipelines.new_folder import refuse_file, write_whole
from softmoe_clip.data_pipelines.samples import printable

SIZES = ("num_pictures", "num_captions", "num_classes")


@dataclass(frozen=True)
class Results:
    """Metrics such as `retrieval/flickr8k/image_to_text/recall@5`, what chance gives for each, and how they were made.

    `details` holds, under `kind/name`, what a report wants to know beyond the numbers (accuracy per class, ...).
    """

    metrics: dict[str, float]
    chance: dict[str, float]
    meta: dict = field(default_factory=dict)
    details: dict[str, dict] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_whole(Path(path), json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_place(path: Path) -> None:
    """Refuse, before the work, a place where no result file can be written."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a JSON file to write the results to")
    refuse_file(path.parent)


def load_results(path: str | Path) -> Results:
    """Read what `Results.save` wrote."""
    try:
        content = json.loads(Path(path).read_text("utf-8"))
        results = Results(**{name: dict(content[name]) for name in ("metrics", "chance", "meta", "details")})
    except OSError as error:
        raise ValueError(
            f"cannot read the result file {path} ({error.strerror}): write one with `softmoe-clip eval --out FILE`"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a result file of `softmoe-clip eval`") from None
    for kind in ("metrics", "chance"):
        for name, value in getattr(results, kind).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{path}: {name} in its {kind} must be a number, got {value!r}: evaluate again")
    return results


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Name result files by their stem, with as many of the folders above as it takes to tell each from the others."""
    full = [path.absolute().with_suffix("").parts for path in paths]
    names = []
    for parts in full:
        others = [other for other in full if other != parts]
        count = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        names.append(str(Path(*parts[-count:])))
    return names


def times_chance(name: str, value: float, chance: float | None) -> float | None:
    """Say how many times better than chance a metric is (a rank: how many times smaller); None where either is zero."""
    if chance is None or 0 in (value, chance):
        return None
    return chance / value if is_rank(name) else value / chance


def is_rank(name: str) -> bool:
    """Tell a rank (1 is best) from a share (1 is best, shown in percent)."""
    return name.endswith("rank")


def shown(name: str, value: float | None) -> str:
    """Write a share in percent, a rank as it is."""
    if value is None:
        return ""
    return f"{value:,.1f}" if is_rank(name) else f"{100 * value:.2f} %"


def table(results: Results, title: str | None = None):
    """Lay out one evaluation: metric, value, chance, times chance."""
    from rich.table import Table
    from rich.text import Text

    rows = Table("metric", title=title)
    for column in ("value", "chance", "times chance"):
        rows.add_column(column, justify="right")
    for name, value in results.metrics.items():
        chance = results.chance.get(name)
        times = times_chance(name, value, chance)
        # As Text: in a plain string rich would take what stands in square brackets for markup.
        rows.add_row(Text(name), shown(name, value), shown(name, chance), "" if times is None else f"{times:.1f}")
    return rows


def comparison(results: Sequence[Results], names: Sequence[str]):
    """Lay out several evaluations: one column per model, the best of each row marked, chance last."""
    from rich.table import Table
    from rich.text import Text

    rows = Table("metric")
    for name in (*names, "chance"):
        rows.add_column(Text(name), justify="right")
    for metric in dict.fromkeys(name for result in results for name in result.metrics):
        values = [result.metrics.get(metric) for result in results]
        present = [value for value in values if value is not None]
        best = (min if is_rank(metric) else max)(present)
        differ = min(present) < max(present)
        cells = [Text(shown(metric, v), style="bold" if differ and v == best else "") for v in values]
        chances = {result.chance[metric] for result in results if metric in result.chance}
        chance = shown(metric, chances.pop()) if len(chances) == 1 else "differs" if chances else ""
        rows.add_row(Text(metric), *cells, chance)
    return rows


def print_results(results: Results) -> None:
    """Print the table of one evaluation, and what it could not read."""
    _print(table(results))
    for task, about in tasks_of(results).items():
        if skipped := about.get("skipped"):
            bad, num_pictures = skipped[0], about["num_pictures"] + len(skipped)
            first = printable(f"{bad['key']} in {bad['shard']}: {bad['reason']}")
            print(f"{task}: {len(skipped):,} of {num_pictures:,} pictures could not be read (first: {first})")


def print_comparison(results: Sequence[Results], names: Sequence[str]) -> None:
    """Print several evaluations side by side, and where they did not measure the same."""
    _print(comparison(results, names))
    for line in other_sizes(results, names):
        print(line)


def other_sizes(results: Sequence[Results], names: Sequence[str]) -> list[str]:
    """Name the tasks whose sets differ in size: one name, but not one measurement."""
    lines = []
    for task in dict.fromkeys(task for result in results for task in tasks_of(result)):
        about = [tasks_of(result).get(task, {}) for result in results]
        for size in SIZES:
            found = {name: each[size] for name, each in zip(names, about, strict=True) if size in each}
            if len(set(found.values())) > 1:
                counts = ", ".join(f"{count} in {name}" for name, count in found.items())
                lines.append(f"{task} was not measured on the same: {size} is {counts}")
    return lines


def tasks_of(results: Results) -> dict[str, dict]:
    """Return what is known of each task; of a file that `eval` did not write, perhaps nothing."""
    tasks = results.meta.get("tasks")
    return {name: about for name, about in tasks.items() if isinstance(about, dict)} if isinstance(tasks, dict) else {}


def _print(rows) -> None:
    import sys

    from rich.console import Console

    # Into a file or a pipe a table is as wide as it needs to be: cut or wrapped names could not be searched for.
    Console(width=None if sys.stdout.isatty() else 400).print(rows)
