"""Metrics in words people read: a title, the value, and chance beside it."""

import re
from typing import NamedTuple

from softmoe_clip.eval.results import is_rank
from softmoe_clip.report.run_record import Numbers

WAYS = {"text_to_image": "Text to picture", "image_to_text": "Picture to text"}
TIMES = "\N{MULTIPLICATION SIGN}"
NO_BREAK = "\N{NO-BREAK SPACE}"
MEASURES = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class", "median_rank": "median rank"}
# Which measures make the headline, most telling first.
HEADLINE = ("top1", "text_to_image/recall@1", "accuracy", "text_to_image/recall@10", "image_to_text/recall@10")
NUM_HEADLINES = 6


class Figure(NamedTuple):
    """One number to show: bar and tick are places on a scale of 0..100 for value and chance (None: not a share)."""

    name: str
    title: str
    task: str
    value: str
    chance: str
    times: str
    bar: float | None
    tick: float | None
    better: bool | None


def figure(name: str, value: float, chance: float | None) -> Figure:
    """Put one metric into words."""
    title, task = in_words(name)
    if is_rank(name):
        better = None if chance is None else value < chance
        return Figure(
            name, title, task, f"{value:,.6g}", "" if chance is None else f"{chance:,.6g}", "", None, None, better
        )
    if not is_share(name):
        return Figure(
            name, title, task, f"{value:.4g}", "" if chance is None else f"{chance:.4g}", "", None, None, None
        )
    times = f"{value / chance:.{0 if value >= 9.95 * chance else 1}f}{TIMES}" if chance else ""
    tick = None if chance is None else 100 * chance
    better = None if chance is None else value > chance
    return Figure(
        name, title, task, percent(value), "" if chance is None else percent(chance), times, 100 * value, tick, better
    )


def in_words(name: str) -> tuple[str, str]:
    """Split a metric's name into a title and the task it was measured on."""
    kind, _, rest = name.partition("/")
    *task, measure = rest.split("/") if rest else [kind]
    if task and task[-1] in WAYS:
        way = WAYS[task.pop()]
        return f"{way}, {MEASURES.get(measure, measure)}", "/".join(task)
    measure = MEASURES.get(measure, measure.replace("_", " "))
    title = {"zero_shot": f"Zero-shot, {measure}", "relations": f"Relations, {measure}"}.get(kind)
    return title or (f"{kind.replace('_', ' ').capitalize()}, {measure}" if rest else measure), "/".join(task)


def is_share(name: str) -> bool:
    """Whether a metric lies in 0..1 and is shown in percent."""
    measure = name.rsplit("/", 1)[-1]
    return measure in ("top1", "top5", "mean_per_class", "accuracy") or measure.startswith(("recall@", "top"))


def percent(value: float) -> str:
    """0.412 as 41.2 %, 0.002 as 0.20 %, on one line."""
    return f"{100 * value:.{1 if value >= 0.01 or value == 0 else 2}f}{NO_BREAK}%"


def all_figures(numbers: Numbers) -> list[Figure]:
    """Every metric, in the order of its name, where 5 comes before 10."""
    return [
        figure(name, numbers.metrics[name], numbers.chance.get(name)) for name in sorted(numbers.metrics, key=parts)
    ]


def parts(name: str) -> list[str | int]:
    """Split a name into words and numbers, in turn, to sort by."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", name))]


def headline_figures(numbers: Numbers) -> list[Figure]:
    """The few numbers to open with: one of each telling kind, over the tasks in turn."""
    chosen = []
    for ending in HEADLINE:
        found = [name for name in numbers.metrics if name.endswith(f"/{ending}")]
        chosen += sorted(found, key=lambda name: name.count("/"))  # the whole before its parts, else as in the suite
    chosen = chosen or [name for name in sorted(numbers.metrics) if is_share(name)]
    return [figure(name, numbers.metrics[name], numbers.chance.get(name)) for name in chosen[:NUM_HEADLINES]]
