"""Charts as inline SVG in the report's own style: their colours are CSS variables, so they follow light and dark."""

import io
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# matplotlib draws in these stand-in colours; in the SVG each becomes a variable of the page's style sheet.
SOFT, HAIR, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {SOFT: "var(--soft)", HAIR: "var(--hair)", ACCENT: "var(--accent)", SECOND: "var(--second)"}

STYLE = {
    "svg.fonttype": "none",
    "font.size": 12.5,
    "axes.edgecolor": HAIR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": HAIR,
    "grid.linewidth": 1.0,
    "xtick.color": HAIR,
    "ytick.color": HAIR,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "xtick.major.size": 4,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
}


class Curve(NamedTuple):
    """One line of a chart; a `smooth` curve is drawn over its own raw values in a faint tone."""

    steps: Sequence[float]
    values: Sequence[float]
    colour: str = ACCENT
    smooth: bool = False
    dots: bool = False


def line_chart(
    curves: Sequence[Curve], name: str, alt: str, size: tuple[int, int], unit: str = "", chance=None, floor=None
) -> str:
    """Draw curves over steps as one SVG element; `chance` is a dotted level, `size` is in CSS pixels.
    `floor` is a value the axis must show.

    `name` must be unique in the page: it keeps the ids of several charts apart. `unit` is "%", or "".
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    width, height = size
    with rc_context(STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((46 / width, 28 / height, 1 - 62 / width, 1 - 40 / height))
        scale = 100 if unit == "%" else 1
        for curve in curves:
            steps, values = np.asarray(curve.steps, float), np.asarray(curve.values, float) * scale
            if curve.smooth:
                axes.plot(steps, values, color=curve.colour, linewidth=1, alpha=0.4)
                values = smoothed(values)
            dots = {"marker": "o", "markersize": 4.5, "markeredgewidth": 0} if curve.dots else {}
            axes.plot(steps, values, color=curve.colour, linewidth=2, **dots)
        if chance is not None:
            axes.axhline(chance * scale, color=SOFT, linewidth=1.3, linestyle=(0, (1, 2.5)), dash_capstyle="round")
        if floor is not None:
            axes.axhline(floor, alpha=0)
        tidy_axes(axes, unit, num_ticks=max(2, round(width / 120)))
        return as_svg(figure, name, alt)


# An axis spans at least this part of its numbers: below it, what a sum in another order changes would look large.
LEAST_SPAN = 1e-3


def tidy_axes(axes, unit: str, num_ticks: int) -> None:
    """Few round ticks, steps written as 1,000 or 20k."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.margins(x=0.01, y=0.08)
    low, high = axes.get_ylim()
    if (lacking := LEAST_SPAN * max(abs(low), abs(high)) - (high - low)) > 0:
        axes.set_ylim(low - lacking / 2, high + lacking / 2)
    axes.xaxis.set_major_locator(MaxNLocator(num_ticks, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: thousands(step)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: height_in_words(y, *axes.get_ylim()) + unit))


def height_in_words(y: float, low: float, high: float) -> str:
    """Write a tick of an axis in three digits, or in as many as tell it from its neighbours."""
    narrow = max(abs(low), abs(high)) / max(high - low, 1e-30)
    return f"{y:.{max(3, math.ceil(math.log10(max(narrow, 1)) + 2))}g}" if y < 1000 else thousands(y)


def thousands(step: float) -> str:
    """1500 as 1,500 and 20000 as 20k."""
    return f"{step / 1000:g}k" if step >= 10_000 else f"{step:,.0f}"


def smoothed(values: np.ndarray, share: float = 0.04) -> np.ndarray:
    """Average each value with its neighbours, over a window of `share` of the curve; windows shrink at the ends."""
    half = int(len(values) * share / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    reach = np.minimum(half, np.minimum(place, len(values) - 1 - place))
    return (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)


def as_svg(figure, name: str, alt: str) -> str:
    """Turn a figure into an <svg> element for a page: own ids, no font, no fixed size, colours from the style sheet."""
    from html import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family:[^;\"]*;?|font: ([\d.]+px)[^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else "", svg)
    svg = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    view_box = re.search(r'viewBox="[^"]*"', svg)[0]
    opening = f'<svg class="chart {name}" {view_box} role="img" aria-label="{escape(alt, quote=True)}">'
    return opening + svg[svg.index(">") + 1 :].strip()
