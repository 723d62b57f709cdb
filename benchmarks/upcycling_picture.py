"""Draw the curves of benchmarks/upcycling.py: one panel for each choice of layers."""

from pathlib import Path
from statistics import mean

MODES = ("copy", "noise", "shared", "centroids")
LAYERS = {"last_half": "Experts in the last half of the blocks", "0-3": "Experts in all blocks"}
# The report's light colours; the dense tower's is that of its quiet text.
PAPER, INK, QUIET, LINE = "#faf8f3", "#1e1b18", "#6b645b", "#ddd6c9"
COLOURS = {"dense": QUIET, "copy": "#b4471f", "noise": "#c99a2e", "shared": "#2a6496", "centroids": "#23774a"}
NAMES = {"dense": "dense, trained on"}


def mean_recall(curve: dict[str, list[float]]) -> list[float]:
    """Average recall@10 of both ways, in percent, at each measured step."""
    return [50 * (there + back) for there, back in zip(curve["text_to_image"], curve["image_to_text"], strict=True)]


def draw(rows: dict[str, dict], file: Path) -> None:
    """Draw one panel for each choice of layers: the mean over seeds as a line, from the least to the most as a band."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from softmoe_clip.report.plots import HAIR, SOFT, STYLE, tidy_axes

    light = {HAIR: LINE, SOFT: QUIET}
    style = {key: light.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    fonts = {"font.family": "sans-serif", "font.sans-serif": ["Liberation Sans", "Arial", "DejaVu Sans"]}
    panels = [layers for layers in LAYERS if any(name.endswith(f", {layers}") for name in rows)]
    with rc_context(style | fonts | {"text.color": INK}):
        width = max(7.6, 4.9 * len(panels) + 0.4)
        figure = Figure(figsize=(width, 4.3), facecolor=PAPER)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        figure.subplots_adjust(left=0.63 / width, right=1 - 0.22 / width, bottom=0.15, top=0.74, wspace=0.09)
        for axes, layers in zip(all_axes, panels, strict=True):
            shown = {
                name.removesuffix(f", {layers}"): row for name, row in rows.items() if name.endswith(f", {layers}")
            }
            for mode, row in {"dense": rows["dense"], **shown}.items():
                dashes = (
                    {"linestyle": (0, (4, 2.5)), "linewidth": 1.6, "zorder": 3} if mode == "dense" else {"linewidth": 2}
                )
                steps, columns = row["curves"][0]["steps"], [*zip(*map(mean_recall, row["curves"]), strict=True)]
                axes.plot(steps, [*map(mean, columns)], color=COLOURS[mode], marker="o", markersize=4, **dashes)
                band = {"color": COLOURS[mode], "alpha": 0.13, "linewidth": 0}
                axes.fill_between(steps, [*map(min, columns)], [*map(max, columns)], **band)
            tidy_axes(axes, "%", num_ticks=5)
            axes.set_title(LAYERS[layers], loc="left", fontsize=12, color=INK, pad=10)
            axes.set_xlabel("training steps", fontsize=10.5, color=QUIET, loc="right", labelpad=4)
            axes.tick_params(labelsize=10.5)
        figure.text(0.26 / width, 0.93, "What upcycling costs, and how soon it is won back", fontsize=15, color=INK)
        all_axes[-1].set_title("recall@10, mean of both ways", loc="right", fontsize=10.5, color=QUIET, pad=10)
        legend(figure, [mode for mode in COLOURS if any(name.split(",")[0] == mode for name in rows)])
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=160, facecolor=PAPER)


def legend(figure, modes: list[str]) -> None:
    """Write the names of the curves in one line, each behind a stroke of its colour."""
    from matplotlib.lines import Line2D

    width = figure.get_figwidth()
    x = 0.26 / width
    for mode in modes:
        style = (0, (2.5, 1.5)) if mode == "dense" else "-"
        figure.add_artist(
            Line2D([x, x + 0.22 / width], [0.872] * 2, color=COLOURS[mode], linewidth=2.2, linestyle=style)
        )
        label = figure.text(x + 0.3 / width, 0.872, NAMES.get(mode, mode), fontsize=11, color=INK, va="center")
        x = label.get_window_extent().x1 / figure.bbox.width + 0.25 / width
