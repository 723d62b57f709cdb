"""Several runs in one picture: a small chart for each metric, every curve named where it ends."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from softmoe_clip.data_pipelines.new_folder import write_whole
from softmoe_clip.report.data_charts import ON_PAPER, PAPER, paper_style
from softmoe_clip.report.numbers import in_words, is_share
from softmoe_clip.report.plots import thousands, tidy_axes
from softmoe_clip.report.run_series import RunSeries, XAxis, choose, read_runs

# Okabe and Ito's colours, which colour-blind readers can tell apart; a dark violet for their yellow, which paper
# swallows. From the fifth run on curves are dashed too, so that colour is never all there is.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b8558a", "#e69f00", "#3d9fdb", "#3a3a3a", "#6f3fa0")
DASHES = ("-", "-", "-", "-", (0, (5, 1.6)), (0, (5, 1.6)), (0, (5, 1.6)), (0, (5, 1.6)))
ROUGH = ("loss", "gradient_norm", "pairs_per_second")
SHARE = 0.04  # of a curve, which a rough one is averaged over
SPREAD = 30  # gradient norms that differ more are drawn on a logarithmic scale
TITLES = {
    "loss": "Training loss",
    "val/loss": "Loss on held-out pairs",
    "lr": "Learning rate",
    "gradient_norm": "Gradient norm",
    "routing/dispatch_entropy": "Dispatch entropy, 1 is uniform",
    "routing/gate_entropy": "Gate entropy, 1 is uniform",
    "routing/combine_entropy": "Combine entropy, 1 is uniform",
}
X_TITLES = {"step": "steps", "samples_seen": "pairs seen", "minutes": "minutes of training"}
# In CSS pixels, of which there are 72 to matplotlib's inch.
PANEL, LEFT, TOP, BOTTOM, LINE = (300, 170), 68, 44, 36, 15
HEAD = 26
LONGEST_NAME = 26


def plot(runs: Sequence[str | Path], out: str | Path = "plot.png", metrics: Sequence[str] = (), x: XAxis = "step"):
    """Draw the runs' metrics over steps, pairs or minutes into one picture (PNG, SVG or PDF); return its path.

    Rough curves are drawn as their mean over 4 % of the run, over a pale line of what was logged. Minutes are those of
    training, without the time in which it was measured.
    """
    out = Path(out)
    if x not in get_args(XAxis):
        raise ValueError(f"x must be one of {', '.join(get_args(XAxis))}, got {x!r}")
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"the picture must end in .png, .svg or .pdf, got {out}")
    series = read_runs(runs, x)
    chosen = choose(series, metrics)
    if not chosen:
        raise ValueError(f"none of the usual metrics is in {', '.join(map(str, runs))}: name some with --metric")
    save(figure_of(series, chosen, x), out)
    return out


def save(figure, out: Path) -> None:
    """Write the picture, whole or not at all."""
    from matplotlib import rc_context

    picture = io.BytesIO()
    with rc_context(paper_style()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that matplotlib's font lacks become boxes
        figure.savefig(picture, format=out.suffix[1:], dpi=144, facecolor=PAPER)
    write_whole(out, picture.getvalue())


def figure_of(runs: Sequence[RunSeries], metrics: Sequence[str], x: XAxis):
    """Lay the charts out in rows; to the right of each there is room for the names."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = max(len(shortened(run.name)) for run in runs)
    right = 80 if len(runs) == 1 else 24 + 6.4 * names
    # As many rows as the names need: eight of them must find room beside a chart.
    width, height = PANEL[0], max(PANEL[1], LINE * len(runs))
    columns = min(len(metrics), 2 if len(metrics) <= 4 else 3)
    rows = -(-len(metrics) // columns)
    cell = LEFT + width + right, TOP + height + BOTTOM
    size = columns * cell[0], rows * cell[1] + HEAD
    with rc_context(paper_style()):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72))
        for place, metric in enumerate(metrics):
            row, column = divmod(place, columns)
            corner = column * cell[0] + LEFT, size[1] - HEAD - (row + 1) * cell[1] + BOTTOM
            box = corner[0] / size[0], corner[1] / size[1], width / size[0], height / size[1]
            draw(figure.add_axes(box), runs, metric, x, height)
        head = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
        figure.text(12 / size[0], 1 - 22 / size[1], head, color=ON_PAPER.soft, fontsize=13, weight="bold")
        if any(is_smoothed(metric, run) for metric in metrics for run in runs):
            note = f"bold: mean over {SHARE:.0%} of a run, pale: as logged"
            figure.text(1 - 12 / size[0], 1 - 22 / size[1], note, color=ON_PAPER.soft, fontsize=11, ha="right")
    return figure


def draw(axes, runs: Sequence[RunSeries], metric: str, x: XAxis, height: float) -> None:
    """Draw one metric of all runs that have it."""
    title, unit = title_of(metric)
    ends = []
    for number, run in enumerate(runs):
        if metric not in run.curves:
            continue
        places, values = run.curves[metric]
        values = values * (100 if unit else 1)
        look = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        if is_smoothed(metric, run):
            axes.plot(places, values, color=look["color"], linewidth=0.8, alpha=0.22)
            values = window_mean(values)
        few = {"marker": "o", "markersize": 4, "markeredgewidth": 0} if len(places) <= 25 else {}
        axes.plot(places, values, linewidth=1.9, **look, **few)
        name = f"{values[-1]:.3g}{unit}" if len(runs) == 1 else shortened(run.name)
        ends.append((float(places[-1]), float(values[-1]), look["color"], name))
    drawn = np.concatenate([run.curves[metric][1] for run in runs if metric in run.curves])
    tidy_axes(axes, unit, num_ticks=4)
    longest = max(places[-1] for run in runs for places, _ in run.curves.values())
    axes.set_xlim(0, 1.01 * longest)  # the same in all charts, so that they can be read one above the other
    if metric.startswith("gradient_norm") and (drawn > 0).all() and drawn.max() > SPREAD * drawn.min():
        logarithmic(axes, subs=(1,) if drawn.max() > 1000 * drawn.min() else (1, 3))
    if x == "minutes":
        axes.xaxis.get_major_locator().set_params(integer=False, steps=[1, 2, 2.5, 5, 10])
        axes.xaxis.set_major_formatter(lambda minutes, _: f"{minutes:.3g}")
    axes.set_title(title, loc="left", fontsize=13, color="#2b2723", pad=9)
    axes.set_xlabel(X_TITLES[x], fontsize=11, color=ON_PAPER.soft, labelpad=2)
    name_ends(axes, ends, height)


def logarithmic(axes, subs: tuple[int, ...]) -> None:
    """Scale y by factors of ten, with plain numbers at these multiples of them."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.3g}" if y < 1000 else thousands(y))


def name_ends(axes, ends: list[tuple[float, float, str, str]], height: float) -> None:
    """Write each name beside its curve's end; where ends are close, names move apart and a thin line leads there."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    border = axes.get_xlim()[1]
    to_place = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    wanted = [float(to_place.transform((end[0], end[1]))[1]) for end in ends]
    for (x, _, colour, name), at, text_at in zip(ends, wanted, apart(wanted, LINE / height), strict=True):
        start = float(to_place.transform((x, low))[0])
        reaches = x >= border - 0.03 * (border - axes.get_xlim()[0])
        axes.plot(
            [start, 1.0, 1.035],
            [at, at, text_at],
            transform=axes.transAxes,
            color=colour,
            linewidth=0.9,
            linestyle="-" if reaches else (0, (1, 2)),
            alpha=1 if reaches else 0.6,
            clip_on=False,
        )
        axes.text(
            1.045, text_at, name, transform=axes.transAxes, color=darker(colour), fontsize=11, va="center_baseline"
        )


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Move sorted places in 0..1 until neighbours are `gap` apart; those that are too close spread around their mean.

    This is isotonic regression: without the gaps they need, places must not fall, so that blocks of them share a mean.
    """
    blocks: list[list[float]] = []
    for number, place in enumerate(places):
        blocks.append([place - number * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    means = [float(np.mean(block)) for block in blocks for _ in block]
    most = max(0.0, 1 - gap * (len(places) - 1))
    return [min(max(mean, 0.0), most) + number * gap for number, mean in enumerate(means)]


def window_mean(values: np.ndarray) -> np.ndarray:
    """Average each value with its neighbours, over a window of SHARE of the curve, of which the ends have a part."""
    half, number = int(len(values) * SHARE / 2), len(values)
    sums, place = np.concatenate([[0.0], np.cumsum(values)]), np.arange(number)
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, number)
    return (sums[last] - sums[first]) / (last - first)


def is_smoothed(metric: str, run: RunSeries) -> bool:
    """Return whether a run's curve is rough, and long enough for a mean over a share of it."""
    return metric.split("/")[0] in ROUGH and metric in run.curves and len(run.curves[metric][0]) * SHARE >= 2


def title_of(metric: str) -> tuple[str, str]:
    """Return a metric's title, and "%" for a share."""
    if metric in TITLES:
        return TITLES[metric], ""
    if not metric.startswith("eval/"):
        return metric, ""
    title, task = in_words(metric.removeprefix("eval/"))
    return f"{title} ({task})" if task else title, "%" if is_share(metric) else ""


def shortened(name: str) -> str:
    """Leave the middle out of a name that is too long."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME // 2 - 1]}…{name[-LONGEST_NAME // 2 :]}"


def darker(colour: str) -> tuple[float, ...]:
    """Return a colour that is dark enough for small letters."""
    from matplotlib.colors import to_rgb

    return tuple(0.72 * part for part in to_rgb(colour))
