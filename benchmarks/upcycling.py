"""Upcycle a dense Flickr8k model in every mode, train each on, and draw validation recall against training steps.

    python benchmarks/upcycling.py FLICKR8K_FOLDER --work runs/upcycling

The dense model is trained first, as the rows of benchmarks/flickr8k.py are; `--dense RUN` takes a run that is there.
It is trained on too, for as many steps, on the same pictures in the same order and with the same schedule. Recall is
that of the validation pictures, before the first step and every few steps. Results go into a JSON beside this file and
a picture into docs; runs that are finished are not repeated.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from flickr8k import CONFIG, DENSE, machine, softmoe_clip

from softmoe_clip.config import TrainConfig, find_config
from softmoe_clip.data_pipelines.strict import load_strict, read_yaml
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.launch import tune_cpu_memory

# The slots of SoftMoE-demo: its forward FLOPs are 1 % above those of the dense tower.
NUM_EXPERTS, SLOTS_PER_EXPERT = 14, 4
MODES = ("copy", "noise", "shared", "centroids")
LAYERS = {"last_half": "Experts in the last half of the blocks", "0-3": "Experts in all blocks"}
KEY = "retrieval/flickr8k/"
WAYS = ("text_to_image", "image_to_text")


class Start(NamedTuple):
    """A model to train on: its folder, and what its upcycling reported."""

    mode: str
    model: Path
    settings: dict | None  # model.image_moe of the run
    cosine: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a folder with captions.json and splits train, val, test")
    parser.add_argument("--work", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--dense", type=Path, help="a dense run of benchmarks/flickr8k.py; trained here if not given")
    parser.add_argument("--dense-steps", type=int, default=3020)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument(
        "--shards", type=Path, help="shards that benchmarks/flickr8k.py packed, and its tokenizer beside"
    )
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--layers", default=",".join(LAYERS))
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results/upcycling.json")
    parser.add_argument("--picture", type=Path, default=here.parent / "docs/upcycling.png")
    options = parser.parse_args()
    tune_cpu_memory()

    options.shards = options.shards or packed(options)
    dense = options.dense or train_dense(options)
    rows = {}
    found = {"machine": machine(), "dense": dense_record(dense), "rows": rows}
    starts = [("dense", None)] + [
        (mode, layers) for layers in options.layers.split(",") for mode in options.modes.split(",")
    ]
    for mode, layers in starts:
        start = Start("dense", dense / "model", None, 1.0) if layers is None else upcycled(options, dense, mode, layers)
        rows[mode if layers is None else f"{mode}, {layers}"] = row(options, start, layers)
        write_results(options.out, {f"{options.steps} steps, lr {options.lr:g}": found})
    print(table(rows))
    draw(rows, options.picture)


def packed(options) -> Path:
    """Pack shards and train the tokenizer, as benchmarks/flickr8k.py does, or find them."""
    shards = options.work / "shards"
    if not shards.exists():
        softmoe_clip("pack", options.source, shards)
        softmoe_clip("train-tokenizer", shards / "train", options.work / "tokenizer.model", "--vocab-size", "4000")
    return shards


def train_dense(options) -> Path:
    """Train the dense model that is upcycled."""
    steps, out = options.dense_steps, options.work / "dense"
    train(options, out, {"steps": steps, "optim": {"warmup": steps // 10}, "model": {"start": "quick"}})
    return out


def dense_record(run: Path) -> dict:
    """Say how the dense model was trained."""
    config = read_yaml(run / "config.yaml")
    return {"arch": config["model"]["arch"], "steps": config["steps"], "batch_size": config["batch_size"]}


def upcycled(options, dense: Path, mode: str, layers: str) -> Start:
    """Upcycle the dense model, or find that it is done."""
    from softmoe_clip.models.upcycle import upcycle

    out = options.work / f"{mode}_{layers}"
    if not (out / "cosine.json").exists():
        seen = str(options.shards / "train")  # centroids are fitted to some of them
        done = upcycle(str(dense), out / "start", NUM_EXPERTS, layers, mode, SLOTS_PER_EXPERT, pictures=seen)
        (out / "cosine.json").write_text(json.dumps(done.image.mean))
    written = json.loads((out / "start/open_clip_config.json").read_text())
    return Start(mode, out / "start", written["softmoe"]["image_moe"], json.loads((out / "cosine.json").read_text()))


def row(options, start: Start, layers: str | None) -> dict:
    """Measure a start, train it on, and return its curve and its costs."""
    from softmoe_clip.models.summary import summary

    run = options.work / "_".join(filter(None, (start.mode, layers, str(options.steps), f"{options.lr:g}")))
    first = run.with_name(run.name + "_step_0.json")
    if not first.exists():
        first.write_text(json.dumps(measured(options, start.model)))
    train(
        options,
        run,
        {
            "steps": options.steps,
            "init": str(start.model),
            "optim": {"warmup": options.warmup, "lr": options.lr},
            "model": {"start": "reference", "image_moe": start.settings},
            "eval": {"every": options.every, "suite": str(write_suite(options))},
        },
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = {0: json.loads(first.read_text())}
    points |= {line["step"]: unprefixed(line) for line in lines if f"eval/{KEY}{WAYS[0]}/recall@10" in line}
    cost = summary(str(start.model))["image"]
    return {
        "cosine": start.cosine,
        "gflops": cost["gflops"],
        "parameters": cost["parameters"],
        "steps": list(points),
        "recall@10": {way: [point[f"{KEY}{way}/recall@10"] for point in points.values()] for way in WAYS},
    }


def unprefixed(line: dict) -> dict:
    """Give metrics of a run the names they have in a suite."""
    return {name.removeprefix("eval/"): value for name, value in line.items()}


def measured(options, model: Path) -> dict:
    """Score a model on the validation pictures."""
    from softmoe_clip.eval.suites import run_suite
    from softmoe_clip.models.store import load_encoder

    return run_suite(load_encoder(model), suite(options)).metrics


def suite(options) -> SuiteConfig:
    """Retrieval among the validation pictures."""
    return SuiteConfig((TaskConfig("retrieval", "flickr8k", str((options.shards / "val").resolve())),))


def write_suite(options) -> Path:
    """Write the suite for the training loop."""
    from dataclasses import asdict

    path = options.work / "val.yaml"
    if not path.exists():
        path.write_text(json.dumps({"tasks": [asdict(task) for task in suite(options).tasks]}))
    return path


def train(options, run: Path, settings: dict) -> None:
    """Train, or find that it is done."""
    from softmoe_clip.training.loop import train

    tree = read_yaml(find_config(CONFIG))
    shards = options.shards
    ours = {
        "out": str(run),
        "data": {"train": str(shards / "train"), "val": None},
        "tokenizer": str(shards.parent / "tokenizer.model"),
        "model": {"arch": DENSE},
        "eval": {"every": 0},
    }
    train(load_strict(TrainConfig, merged(merged(tree, ours), settings)))


def merged(tree: dict, changes: dict) -> dict:
    """Return the tree with the changes in it, key by key."""
    return tree | {
        key: merged(tree[key], value) if isinstance(tree.get(key), dict) and isinstance(value, dict) else value
        for key, value in changes.items()
    }


def mean_recall(row: dict) -> list[float]:
    """Average recall@10 of both ways, in percent, at each measured step."""
    return [50 * (there + back) for there, back in zip(*(row["recall@10"][way] for way in WAYS), strict=True)]


def table(rows: dict[str, dict]) -> str:
    """Lay the curves out as Markdown."""
    steps = next(iter(rows.values()))["steps"]
    lines = [
        "| start, layers | cosine | GFLOP | parameters | " + " | ".join(f"{step}" for step in steps) + " |",
        "| --- |" + " ---: |" * (len(steps) + 3),
    ]
    for name, row in rows.items():
        curve = " | ".join(f"{value:.1f}" for value in mean_recall(row))
        cost = f"{row['gflops']:.4f} | {row['parameters'] / 1e6:.2f} M"
        lines.append(f"| {name} | {row['cosine']:.4f} | {cost} | {curve} |")
    return "\n".join(lines)


# The report's light colours; the dense tower's is that of its quiet text.
PAPER, INK, QUIET, LINE = "#faf8f3", "#1e1b18", "#6b645b", "#ddd6c9"
COLOURS = {"dense": QUIET, "copy": "#b4471f", "noise": "#c99a2e", "shared": "#2a6496", "centroids": "#23774a"}
NAMES = {"dense": "dense, trained on"}


def draw(rows: dict[str, dict], file: Path) -> None:
    """Draw one panel for each choice of layers, over the same axis of recall."""
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
                axes.plot(row["steps"], mean_recall(row), color=COLOURS[mode], marker="o", markersize=4, **dashes)
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


if __name__ == "__main__":
    main()
