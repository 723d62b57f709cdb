"""Upcycle a dense Flickr8k model in every mode, train each on, and draw validation recall against training steps.

    python benchmarks/upcycling.py FLICKR8K_FOLDER --work runs/upcycling

The dense model is trained first, as the rows of benchmarks/flickr8k.py are; `--dense RUN` takes a run that is there.
It is trained on too, for as many steps, on the same pictures in the same order and with the same schedule. Each start
is drawn and trained on with three seeds, each run with one thread in a process of its own, as many at once as there are
cores. Recall is that of the validation pictures, before the first step and every few steps. Results go into a JSON
beside this file and a picture into docs; runs that are finished are not repeated.
"""

import argparse
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from apart import merged, train_apart, with_spread
from flickr8k import CONFIG, DENSE, softmoe_clip
from machine import machine, write_results
from upcycling_picture import LAYERS, MODES, draw, mean_recall

from softmoe_clip.config import TrainConfig, find_config
from softmoe_clip.data_pipelines.strict import load_strict, read_yaml
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.launch import keep_cpu_memory

# The slots of SoftMoE-demo: its forward FLOPs are 1 % above those of the dense tower.
NUM_EXPERTS, SLOTS_PER_EXPERT = 14, 4
KEY = "retrieval/flickr8k/"
WAYS = ("text_to_image", "image_to_text")


class Start(NamedTuple):
    """What is trained on, and with which seed: the dense model (no layers), or what upcycling makes of it."""

    mode: str
    layers: str | None
    seed: int

    @property
    def name(self) -> str:
        return self.mode if self.layers is None else f"{self.mode}, {self.layers}"

    @property
    def file_name(self) -> str:
        return "_".join(filter(None, (self.mode, self.layers, str(self.seed))))


def main() -> None:
    options = read_options()
    keep_cpu_memory()
    options.shards = options.shards or packed(options)
    options.dense = options.dense or options.work / "dense"
    starts = [Start("dense", None, seed) for seed in range(options.seeds)]
    starts += [
        Start(mode, layers, seed)
        for layers in options.layers.split(",")
        for mode in options.modes.split(",")
        for seed in range(options.seeds)
    ]
    if options.train:
        train_on(options, next(start for start in starts if start.file_name == options.train))
        return
    train_dense(options)
    write_suite(options)
    models = {start: upcycled(options, start) for start in starts}
    with ThreadPoolExecutor(options.at_once) as pool:  # its threads only wait for processes
        curves = dict(zip(starts, pool.map(lambda start: curve(options, start), starts), strict=True))
    rows = {}
    for start in starts:
        row = rows.setdefault(start.name, {"cosine": [], **costs(models[start]), "curves": []})
        row["cosine"].append(cosine(models[start]))
        row["curves"].append(curves[start])
    found = {"machine": machine(), "dense": dense_record(options.dense), "rows": rows}
    write_results(options.out, {f"{options.steps} steps, lr {options.lr:g}": found})
    print(table(rows))
    draw(rows, options.picture)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a folder with captions.json and splits train, val, test")
    parser.add_argument("--work", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--dense", type=Path, help="a dense run of benchmarks/flickr8k.py; trained here if not given")
    parser.add_argument("--dense-steps", type=int, default=3020)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=20, help="steps between measurements")
    parser.add_argument("--warmup", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="runs, each with one thread")
    parser.add_argument("--shards", type=Path, help="shards packed before, and their tokenizer.model beside them")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--layers", default=",".join(LAYERS))
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "results/upcycling.json")
    parser.add_argument("--picture", type=Path, default=here.parent / "docs/upcycling.png")
    parser.add_argument("--train", metavar="START", help=argparse.SUPPRESS)
    return parser.parse_args()


def packed(options) -> Path:
    """Pack shards and train the tokenizer, as benchmarks/flickr8k.py does, or find them."""
    shards = options.work / "shards"
    if not shards.exists():
        softmoe_clip("pack", options.source, shards)
        softmoe_clip("train-tokenizer", shards / "train", options.work / "tokenizer.model", "--vocab-size", "4000")
    return shards


def train_dense(options) -> None:
    """Train the dense model that is upcycled, or find that it is done."""
    steps = options.dense_steps
    if not (options.dense / "model").exists():
        train(options, options.dense, {"steps": steps, "optim": {"warmup": steps // 10}, "model": {"start": "quick"}})


def dense_record(run: Path) -> dict:
    """Say how the dense model was trained."""
    config = read_yaml(run / "config.yaml")
    return {"arch": config["model"]["arch"], "steps": config["steps"], "batch_size": config["batch_size"]}


def upcycled(options, start: Start) -> Path:
    """Upcycle the dense model, or find that it is done; return the model folder to train on."""
    from softmoe_clip.models.upcycle import upcycle

    if start.layers is None:
        return options.dense / "model"
    model = options.work / "starts" / start.file_name
    if not cosine_file(model).exists():
        shutil.rmtree(model, ignore_errors=True)  # left by a run that was stopped between the two
        seen = str(options.shards / "train")  # centroids are fitted to some of them
        sizes = {"num_experts": NUM_EXPERTS, "slots_per_expert": SLOTS_PER_EXPERT, "layers": start.layers}
        done = upcycle(str(options.dense), model, **sizes, mode=start.mode, pictures=seen, seed=start.seed)
        cosine_file(model).write_text(json.dumps(done.image.mean))
    return model


def cosine_file(model: Path) -> Path:
    """Name the file that keeps what an upcycling reported."""
    return model.with_name(model.name + "_cosine.json")


def cosine(model: Path) -> float:
    """Return the cosine between embeddings before and after; the dense model is its own start."""
    return json.loads(cosine_file(model).read_text()) if cosine_file(model).exists() else 1.0


def costs(model: Path) -> dict:
    """Count a forward pass of one picture, and the parameters, of the image tower."""
    from softmoe_clip.models.summary import summary

    image = summary(str(model))["image"]
    return {"gflops": image["gflops"], "parameters": image["parameters"]}


def run_folder(options, start: Start) -> Path:
    return options.work / f"{options.steps}_steps_lr_{options.lr:g}" / start.file_name


def train_on(options, start: Start) -> None:
    """Measure a start and train it on, in a process of its own."""
    run, model = run_folder(options, start), upcycled(options, start)
    first = at_step_0(run)
    if not first.exists():
        first.write_text(json.dumps(measured(options, model)))
    written = json.loads((model / "open_clip_config.json").read_text()).get("softmoe") or {}
    train(
        options,
        run,
        {
            "seed": start.seed,
            "steps": options.steps,
            "init": str(model),
            "optim": {"warmup": options.warmup, "lr": options.lr},
            "model": {"start": "reference", "image_moe": written.get("image_moe")},
            "eval": {"every": options.every, "suite": str(options.work / "val.yaml")},
        },
    )


def at_step_0(run: Path) -> Path:
    """Name the file of what a start reaches before its first step."""
    return run.with_name(run.name + "_step_0.json")


def curve(options, start: Start) -> dict:
    """Have one start trained on, and return recall on the way."""
    run = run_folder(options, start)
    train_apart(start.file_name, run.with_suffix(".log"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = {0: json.loads(at_step_0(run).read_text())}
    points |= {line["step"]: unprefixed(line) for line in lines if f"eval/{KEY}{WAYS[0]}/recall@10" in line}
    found = {"steps": list(points)} | {way: [p[f"{KEY}{way}/recall@10"] for p in points.values()] for way in WAYS}
    print(f"{start.name}, seed {start.seed}: recall@10 {mean_recall(found)[-1]:.1f} %", file=sys.stderr, flush=True)
    return found


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


def write_suite(options) -> None:
    """Write the suite for the training loop."""
    from dataclasses import asdict

    tasks = [asdict(task) for task in suite(options).tasks]
    (options.work / "val.yaml").write_text(json.dumps({"tasks": tasks}))


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


def table(rows: dict[str, dict]) -> str:
    """Lay the curves out as Markdown: mean and spread over seeds, of recall@10 of both ways, in percent."""
    steps = next(iter(rows.values()))["curves"][0]["steps"]
    lines = [
        "| start, layers | cosine | GFLOP | parameters | " + " | ".join(f"{step}" for step in steps) + " |",
        "| --- |" + " ---: |" * (len(steps) + 3),
    ]
    for name, row in rows.items():
        curve = " | ".join(map(with_spread, zip(*map(mean_recall, row["curves"]), strict=True)))
        cost = f"{row['gflops']:.4f} | {row['parameters'] / 1e6:.2f} M"
        lines.append(f"| {name} | {sum(row['cosine']) / len(row['cosine']):.4f} | {cost} | {curve} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
