"""Train towers of equal forward FLOPs on the same pairs: what they reach in equal steps, and in equal minutes.

    python benchmarks/quality.py scenes --work runs/quality
    python benchmarks/quality.py flickr8k --source FLICKR8K_FOLDER --work runs/quality
    python benchmarks/quality.py classes --source IMAGENETTE_FOLDER --source CIFAR10_FOLDER --work runs/quality

The six settings below were declared before the first run, and all are reported. `scenes` never shows a pair twice.
`classes` trains on captions made from class names and measures zero-shot top-1. Each setting is trained with
three seeds, at a constant rate after the warm-up, so that a curve may be read off anywhere, and measured on the way.
Each run has one thread and a process of its own, as many at once as there are cores. Minutes are steps times the
seconds of a step, taken in interleaved rounds with all cores on the same machine, so that what else it does changes no
result; at equal minutes a curve is read off between its points. Results go into a JSON beside this file and a picture
into docs; runs that are finished are not repeated.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from time import perf_counter

from apart import merged, train_apart, with_spread
from flickr8k import CONFIG, softmoe_clip
from machine import machine, write_results
from turns import TUNED, serve, take_turns

from softmoe_clip.config import TrainConfig, find_config
from softmoe_clip.data_pipelines.strict import load_strict, read_yaml
from softmoe_clip.launch import keep_cpu_memory

# Of the dense tower's 64 tokens a picture, 56 slots leave room for the soft routing's own FLOPs; 16 sparse experts
# take 4 tokens each. Forward FLOPs of all towers lie within 3 %.
SOFT = {"router": "soft", "num_experts": 14, "slots_per_expert": 4}
SPARSE = {"num_experts": 16, "capacity_factor": 1.0}
TOP_1 = {"router": "tokens_choice", "top_k": 1, "bpr": True, "importance_loss": 0.005, "load_loss": 0.005}
SETTINGS: dict[str, dict | None] = {
    "dense": None,
    "soft": SOFT | {"layers": "last_half"},
    "soft, 56 experts": SOFT | {"num_experts": 56, "slots_per_expert": 1, "layers": "last_half"},
    "soft, all blocks": SOFT | {"layers": [0, 1, 2, 3]},
    "experts choice": SPARSE | {"router": "experts_choice", "layers": "last_half"},
    "tokens choice": SPARSE | TOP_1 | {"noise_std": 1.0, "layers": "last_half"},
}
MEASURED = {
    "scenes": ("zero_shot/scenes/top1", "retrieval/scenes/text_to_image/recall@1"),
    "flickr8k": ("retrieval/flickr8k/text_to_image/recall@10", "retrieval/flickr8k/image_to_text/recall@10"),
    "classes": ("zero_shot/imagenette/top1", "zero_shot/cifar10/top1"),
}
HELD_OUT = {"imagenette": "val", "cifar10": "test"}


def main() -> None:
    options = read_options()
    keep_cpu_memory()
    if options.train:
        name, seed = options.train.rsplit(":", 1)
        train(options, name, int(seed))
        return
    if options.work_on:
        work(options)
        return
    pack(options)
    write_suite(options)
    gflops = {name: forward_gflops(options, name) for name in SETTINGS}
    seconds = seconds_of_steps(options)
    with ThreadPoolExecutor(options.at_once) as pool:  # its threads only wait for processes
        runs = [(name, seed) for seed in range(options.seeds) for name in SETTINGS]
        curves = dict(zip(runs, pool.map(lambda run: curve(options, *run), runs), strict=True))
    rows = {name: [curves[name, seed] for seed in range(options.seeds)] for name in SETTINGS}
    found = {"machine": machine(), "steps": options.steps, "batch_size": options.batch_size}
    found |= {"seconds_per_step": seconds, "forward_gflops": gflops, "settings": SETTINGS, "curves": rows}
    write_results(options.out, {options.set: found})
    print(table(options.set, rows, seconds, gflops))
    draw(options.set, rows, seconds, options.pictures / f"quality_{options.set}.png")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", choices=MEASURED)
    parser.add_argument("--source", action="append", default=[], help="folder of pictures (flickr8k, classes)")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--points", type=int, default=5, help="measurements on the way")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="runs, each with one thread")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/quality.json")
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--work-on", help=argparse.SUPPRESS)
    parser.add_argument("--train", metavar="SETTING:SEED", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder = options.work / options.set
    return options


def pack(options) -> None:
    """Make the shards and the tokenizer, or find them."""
    shards = options.folder / "shards"
    if options.set == "scenes":
        if not shards.exists():
            from softmoe_clip.data_pipelines.scenes import write_scenes

            write_scenes(shards, num_train=options.steps * options.batch_size)
    elif options.set == "flickr8k":
        if not shards.exists():
            softmoe_clip("pack", options.source[0], shards)
    else:
        for source in options.source:
            if not (shards / Path(source).name).exists():
                softmoe_clip("pack", source, shards / Path(source).name, "--templates", "openai")
    tokenizer = options.folder / "tokenizer.model"
    if not tokenizer.exists():
        first = train_shards(options)[0]
        softmoe_clip("train-tokenizer", first, tokenizer, *(["--vocab-size", "4000"] * (options.set == "flickr8k")))


def train_shards(options) -> list[str]:
    """Name the folders to train on."""
    shards = options.folder / "shards"
    return [str(p) for p in (sorted(shards.glob("*/train")) if options.set == "classes" else [shards / "train"])]


def write_suite(options) -> None:
    """Write the suite that is measured on the way."""
    shards = (options.folder / "shards").resolve()
    if options.set == "scenes":
        tasks = [
            {"kind": "zero_shot", "name": "scenes", "data": f"{shards}/combinations", "templates": "scenes"},
            {"kind": "retrieval", "name": "scenes", "data": f"{shards}/val"},
        ]
    elif options.set == "flickr8k":
        tasks = [{"kind": "retrieval", "name": "flickr8k", "data": f"{shards}/test"}]
    else:
        tasks = [
            {"kind": "zero_shot", "name": name, "data": f"{shards}/{name}/{split}", "templates": "openai"}
            for name, split in HELD_OUT.items()
        ]
    (options.folder / "suite.yaml").write_text(json.dumps({"tasks": tasks}))


def config(options, name: str, seed: int, run: Path, steps: int, measured: bool) -> TrainConfig:
    """Return the config of one run: all settings share everything but the router's."""
    train = train_shards(options)
    changes = {
        "out": str(run),
        "seed": seed,
        "steps": steps,
        "batch_size": options.batch_size,
        "data": {"train": train[0] if len(train) == 1 else train, "val": None},
        "tokenizer": str(options.folder / "tokenizer.model"),
        "optim": {"schedule": "constant", "warmup": max(1, steps // 10)},
        "model": {"arch": "PlainViT-demo", "image_moe": SETTINGS[name]},
        "eval": {
            "every": options.steps // options.points if measured else 0,
            "suite": str(options.folder / "suite.yaml") if measured else None,
        },
    }
    return load_strict(TrainConfig, merged(read_yaml(find_config(CONFIG)), changes))


def run_folder(options, name: str, seed: int) -> Path:
    return options.folder / f"{options.steps}_steps" / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"


def train(options, name: str, seed: int) -> None:
    """Train one setting with one seed, in a process of its own."""
    from softmoe_clip.training.loop import train

    train(config(options, name, seed, run_folder(options, name, seed), options.steps, measured=True))


def curve(options, name: str, seed: int) -> dict[str, list[float]]:
    """Have one setting trained with one seed and return what was measured on the way."""
    run = run_folder(options, name, seed)
    train_apart(f"{name}:{seed}", run.with_suffix(".log"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if f"eval/{MEASURED[options.set][0]}" in line]
    found = {metric: [line[f"eval/{metric}"] for line in lines] for metric in MEASURED[options.set]}
    last = ", ".join(f"{metric} {100 * values[-1]:.1f} %" for metric, values in found.items())
    print(f"{options.set}: {name}, seed {seed}: {last}", file=sys.stderr, flush=True)
    return {"step": [line["step"] for line in lines]} | found


def seconds_of_steps(options) -> dict[str, float]:
    """Time a step of each setting, all in turn, loading left out: it is the same for all."""
    return {
        name: value for (name, _), value in take_turns([(name, TUNED) for name in SETTINGS], options.rounds).items()
    }


def work(options) -> None:
    """Take steps of one setting on one batch, in a process of its own."""
    import torch

    from softmoe_clip.moe.stats import collect_routing
    from softmoe_clip.training.build import build
    from softmoe_clip.training.losses import LOSSES
    from softmoe_clip.training.optim import make_optimizer

    settings = config(options, options.work_on, 0, options.folder / "timing", 1, measured=False)
    loaded = build(settings)
    optimizer = make_optimizer(loaded.model, settings.optim)
    images = torch.randn(options.batch_size, 3, *loaded.picture_size)
    token_ids = loaded.tokenizer(["a picture of a thing"] * options.batch_size)

    def step() -> float:
        begin = perf_counter()
        with collect_routing(statistics=False) as routing:
            out = loaded.model(images, token_ids)
        loss = LOSSES[settings.loss](out["image_features"], out["text_features"], out["logit_scale"])
        (loss + routing.aux_loss()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return perf_counter() - begin

    serve(step)


def forward_gflops(options, name: str) -> float:
    """Count the image tower's forward pass of one picture."""
    from softmoe_clip.models.complexity import image_complexity
    from softmoe_clip.training.build import build

    loaded = build(config(options, name, 0, options.folder / "counting", 1, measured=False))
    return image_complexity(loaded.model.visual, loaded.image_size).flops / 1e9


def at_minutes(points: dict[str, list[float]], metric: str, seconds: float, minutes: float) -> float:
    """Read a curve off at a time, on the straight line between the two measurements around it."""
    import numpy as np

    return float(np.interp(minutes, [step * seconds / 60 for step in points["step"]], points[metric]))


def table(name: str, rows: dict[str, list[dict]], seconds: dict[str, float], gflops: dict[str, float]) -> str:
    """Lay out mean and spread (standard deviation over seeds), in percent, as Markdown."""
    metrics = MEASURED[name]
    minutes = min(curves[0]["step"][-1] * seconds[setting] / 60 for setting, curves in rows.items())
    titles = [f"{metric}, {when}" for when in ("equal steps", f"{minutes:.1f} minutes") for metric in metrics]
    lines = [f"| {name} | GFLOP | ms a step | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (2 + len(titles))]
    for setting, curves in rows.items():
        steps = [[points[metric][-1] for points in curves] for metric in metrics]
        timed = [[at_minutes(points, metric, seconds[setting], minutes) for points in curves] for metric in metrics]
        cells = " | ".join(with_spread([100 * value for value in values]) for values in steps + timed)
        lines.append(f"| {setting} | {gflops[setting]:.3f} | {1000 * seconds[setting]:.0f} | {cells} |")
    return "\n".join(lines)


COLOURS = ("#6b645b", "#b4471f", "#c99a2e", "#7a4f9a", "#2a6496", "#23774a")


def draw(name: str, rows: dict[str, list[dict]], seconds: dict[str, float], file: Path) -> None:
    """Draw quality against minutes: the mean over seeds as a line, from the least to the most as a band."""
    from matplotlib.figure import Figure

    metrics = MEASURED[name]
    figure = Figure(figsize=(5.2 * len(metrics), 4.2), layout="constrained", facecolor="white")
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for colour, (setting, curves) in zip(COLOURS, rows.items(), strict=True):
            minutes = [step * seconds[setting] / 60 for step in curves[0]["step"]]
            values = [[100 * value for value in column] for column in zip(*(p[metric] for p in curves), strict=True)]
            axes.plot(minutes, [mean(column) for column in values], color=colour, marker="o", ms=4, label=setting)
            axes.fill_between(minutes, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.12, linewidth=0)
        axes.set_title(metric, loc="left", fontsize=11)
        axes.set_xlabel("minutes of training")
        axes.set_ylabel("%")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e0d8", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.axes[0].legend(frameon=False, fontsize=9.5)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
