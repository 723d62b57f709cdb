"""The charts of a data set: caption lengths, picture sizes and words, as SVG for a page and as PNG."""

import io
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.stats import Stats, spread
from softmoe_clip.report.plots import ACCENT, HAIR, SECOND, SOFT, STYLE, as_svg, thousands

WORDS = "frequent_words"  # drawn for PNG; the page has a list
SIZE = (430, 240)  # CSS pixels of a chart
PAPER = "#faf8f3"
NUM_BARS = 40
NUM_WORDS_DRAWN = 24
NUM_BUBBLES = 1500
RATIOS = ((1, 2), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9))
WIDE_RATIOS = ((1, 5), (1, 3), (1, 2), (1, 1), (2, 1), (3, 1), (5, 1))


class Ink(NamedTuple):
    """The colours of a chart."""

    soft: str
    hair: str
    accent: str
    second: str


ON_PAGE = Ink(SOFT, HAIR, ACCENT, SECOND)  # stand-ins, for which the page's style sheet has colours
ON_PAPER = Ink("#6b645b", "#ddd6c9", "#b4471f", "#2a6496")  # the page's light colours, for PNG


class Chart(NamedTuple):
    """A chart of the page: what it shows, in words, and how to draw it on a matplotlib Axes."""

    name: str
    title: str
    about: str
    draw: Callable[..., None]


def all_charts(stats: Stats) -> list[Chart]:
    """Choose the charts for which there is something to draw."""
    shorter = Counter()
    for (width, height), number in stats.sizes.items():
        shorter[min(width, height)] += number
    charts = [
        histogram("words", "Words per caption", stats.words_per_caption),
        token_histogram(stats),
        histogram("captions", "Captions per picture", stats.captions_per_picture),
        histogram("shorter_side", "Shorter side, pixels", shorter),
    ]
    if stats.sizes:
        (width, height), number = stats.sizes.most_common(1)[0]
        share = percent(number / stats.sizes.total())
        about = f"{len(stats.sizes):,} different; the commonest is {width} x {height}, {share} of the pictures."
        charts += [
            Chart("sizes", "Width and height, pixels", about, partial(draw_sizes, sizes=stats.sizes)),
            Chart("ratios", "Width to height", "On a scale of doublings.", partial(draw_ratios, sizes=stats.sizes)),
        ]
    if stats.captions_with_word:
        about = "The share of captions that each is in."
        charts.append(Chart(WORDS, "Most frequent words", about, partial(draw_words, stats=stats)))
    return [chart for chart in charts if chart is not None]


def token_histogram(stats: Stats) -> Chart | None:
    """Say how many captions the model would cut, where it is known what it takes."""
    name, title = "tokens", "Tokens per caption"
    if stats.context_length is None or not stats.tokens_per_caption:
        return histogram(name, title, stats.tokens_per_caption)
    cut = sum(n for length, n in stats.tokens_per_caption.items() if length > stats.context_length)
    share = percent(cut / stats.tokens_per_caption.total())
    about = f"The model takes {stats.context_length}: {share} of the captions are longer and lose their end."
    mark = (stats.context_length, f"{stats.context_length} taken")
    return histogram(name, title, stats.tokens_per_caption, about, mark)


def histogram(
    name: str, title: str, values: Counter, about: str = "", mark: tuple[int, str] | None = None
) -> Chart | None:
    """Make the chart of a histogram of whole numbers; none where all are the same, which the table says."""
    if len(values) < 2 and mark is None:
        return None
    s = spread(values)
    middle = f"Median {s.median:g}, mean {s.mean:.1f}; 95 % have {s.most_of:g} or less, the most is {s.most:,.0f}."
    return Chart(name, title, f"{middle} {about}".strip(), partial(draw_histogram, values=values, mark=mark))


def draw_histogram(axes, ink: Ink, values: Counter, mark: tuple[int, str] | None) -> None:
    """Draw shares as bars of equal width; what lies far above all others is put into the last one."""
    places = np.array(sorted(values))
    numbers = np.array([values[place] for place in places], float)
    least, most = places[0], int(places[np.searchsorted(np.cumsum(numbers) / numbers.sum(), 0.995 - 1e-12)])
    if places[-1] <= most + (most - least + 1) // 4:
        most = int(places[-1])
    if mark is not None:
        most = max(most, min(mark[0], 4 * most))
    step = max(1, -(-(most - least + 1) // NUM_BARS))
    bars = np.bincount((np.minimum(places, most) - least) // step, numbers / numbers.sum())
    left = least + step * np.arange(len(bars)) - 0.5
    axes.bar(left + step / 2, bars * 100, width=0.86 * step, color=ink.accent, linewidth=0)
    axes.set_xlim(left[0] - 0.3 * step, left[0] + step * (len(bars) + 0.3))
    if len(bars) < 4:  # a bar or two should not fill the chart
        middle = float(left[0] + step * len(bars) / 2)
        axes.set_xlim(middle - 3 * step, middle + 3 * step)
    if most < places[-1]:
        axes.annotate(
            f"{most:,} and more", (left[-1] + step, bars[-1] * 100), (0, 6), textcoords="offset points", ha="right",
            color=ink.soft, fontsize=11,
        )  # fmt: skip
    if mark is not None:
        axes.axvline(mark[0] + 0.5, color=ink.second, linewidth=2)
        left_half = mark[0] < (left[0] + left[-1]) / 2
        axes.annotate(
            mark[1],
            (mark[0] + 0.5, 0.98),
            (6 if left_half else -6, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if left_half else "right",
            va="top",
            color=ink.second,
        )
    tidy(axes)


def draw_sizes(axes, ink: Ink, sizes: Counter) -> None:
    """Draw a bubble for each size, its area the share of pictures; a line where width equals height."""
    common = sizes.most_common(NUM_BUBBLES)
    widths, heights = (np.array([size[side] for size, _ in common], float) for side in (0, 1))
    shares = np.array([number for _, number in common]) / sizes.total()
    longest = max(widths.max(), heights.max())
    axes.plot([0, longest], [0, longest], color=ink.soft, linewidth=1.3, linestyle=(0, (1, 2.5)), dash_capstyle="round")
    axes.scatter(widths, heights, s=7 + 900 * shares, color=ink.accent, alpha=0.45, linewidth=0)
    axes.set_xlim(0, widths.max() * 1.1)
    axes.set_ylim(0, heights.max() * 1.1)
    axes.grid(axis="x")
    tidy(axes, unit="")


def draw_ratios(axes, ink: Ink, sizes: Counter) -> None:
    """Draw the ratio of width to height on a logarithmic scale, so that upright and wide pictures weigh the same."""
    logs = np.log2([width / height for width, height in sizes])
    shares = np.array(list(sizes.values())) / sizes.total()
    reach = max(1.1, min(np.abs(logs).max() + 0.1, 3))
    edges = np.linspace(-reach, reach, NUM_BARS + 2)  # an odd number of bars: squares lie inside the middle one
    bars, _ = np.histogram(np.clip(logs, -reach, reach), edges, weights=shares)
    width = edges[1] - edges[0]
    axes.bar((edges[:-1] + edges[1:]) / 2, bars * 100, width=0.86 * width, color=ink.accent, linewidth=0)
    tidy(axes)
    ratios = RATIOS if reach < 1.5 else WIDE_RATIOS
    ticks = {float(np.log2(width / height)): f"{width}:{height}" for width, height in ratios}
    ticks = {place: text for place, text in ticks.items() if abs(place) <= reach}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(-reach, reach)


def draw_words(axes, ink: Ink, stats: Stats) -> None:
    """Draw the share of captions that each of the commonest words is in."""
    words = stats.captions_with_word.most_common(NUM_WORDS_DRAWN)[::-1]
    shares = [100 * number / stats.num_captions for _, number in words]
    names = [word if len(word) <= 14 else f"{word[:13]}..." for word, _ in words]
    axes.barh(names, shares, color=ink.accent, height=0.72)
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=10.5)
    axes.set_ylim(-0.6, len(words) - 0.4)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}%")


def tidy(axes, unit: str = "%") -> None:
    """Few round ticks; shares in per cent."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda x, _: thousands(x))
    axes.yaxis.set_major_formatter(lambda y, _: (f"{y:.3g}" if unit else thousands(y)) + unit)


def figure_of(chart: Chart, ink: Ink, title: bool):
    """Draw a chart, with its title inside if it stands alone."""
    from matplotlib.figure import Figure

    words = chart.name == WORDS
    width, height = SIZE[0], SIZE[1] * (1.7 if words else 1)
    left, top = 92 if words else 50, 46 if title else 14
    whole = height + top
    figure = Figure(figsize=(width / 72, whole / 72))
    axes = figure.add_axes((left / width, 30 / whole, 1 - (left + 14) / width, 1 - (30 + top) / whole))
    if title:
        axes.set_title(chart.title, loc="left", fontsize=14, color=ink.soft, pad=12)
    chart.draw(axes, ink)
    return figure


def drawn_svg(chart: Chart) -> str:
    """Draw for the page."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        return as_svg(figure_of(chart, ON_PAGE, title=False), chart.name, f"{chart.title}. {chart.about}")


def drawn_png(chart: Chart) -> bytes:
    """Draw for anything else."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context(paper_style()):
        figure = figure_of(chart, ON_PAPER, title=True)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # words in scripts that matplotlib's font lacks become boxes; the page has them
            figure.savefig(file, format="png", dpi=144, facecolor=PAPER, metadata={"Software": None})
    return file.getvalue()


def paper_style() -> dict:
    """The page's style in its light colours, for pictures that stand alone."""
    real = dict(zip(ON_PAGE, ON_PAPER, strict=True))
    return {name: real.get(value, value) for name, value in STYLE.items()}


def percent(share: float) -> str:
    """0.0123 as 1.2 %."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
