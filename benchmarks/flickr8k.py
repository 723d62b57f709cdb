"""Train a Soft MoE and a dense image tower side by side on captioned photographs: equal steps, and equal minutes.

    python benchmarks/flickr8k.py FLICKR8K_FOLDER --minutes 15 --work runs/flickr8k

Both towers have the same backbone and forward FLOPs within 5 %. A short run of each measures its speed; then
`soft` trains for the given minutes, `dense, equal steps` for as many steps, `dense, equal minutes` for as long (minutes
are those that the steps take at the measured speed, so that what else the machine does changes no result). The
schedule of each run ends with it, so that no number is taken in the middle of one. Results go into a JSON beside this
file; runs that are finished are not repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from machine import machine, write_results

CONFIG = "configs/clip_softmoe_flickr8k.yaml"
SOFT, DENSE = "SoftMoE-demo", "PlainViT-demo"
TIMED_STEPS = 80
SAME_SPEED = 0.02  # towers that differ less in speed take as many steps in the same time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="a folder with captions.json and splits train, val, test")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--work", type=Path, default=Path("runs/flickr8k"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/flickr8k.json")
    options = parser.parse_args()

    shards = options.work / "shards"
    if not shards.exists():
        softmoe_clip("pack", options.source, shards)
        softmoe_clip("train-tokenizer", shards / "train", options.work / "tokenizer.model", "--vocab-size", "4000")
    batch_size = config_value("batch_size")
    speed = {arch: pairs_per_second(options, arch) for arch in (SOFT, DENSE)}
    steps = {arch: int(speed[arch] * 60 * options.minutes / batch_size) for arch in (SOFT, DENSE)}
    rows = {
        "soft": row(options, "soft", SOFT, steps[SOFT]),
        "dense, equal steps": row(options, "dense, equal steps", DENSE, steps[SOFT]),
    }
    equally_fast = abs(steps[DENSE] / steps[SOFT] - 1) < SAME_SPEED
    rows["dense, equal minutes"] = (
        rows["dense, equal steps"] if equally_fast else row(options, "dense, equal minutes", DENSE, steps[DENSE])
    )
    for found in rows.values():
        found["minutes"] = found["samples_seen"] / speed[found["arch"]] / 60
    found = {"machine": machine(), "pairs_per_second": speed, "rows": rows}
    write_results(options.out, {f"{options.minutes:g} minutes": found})
    print(table(rows))


def row(options, name: str, arch: str, num_steps: int) -> dict:
    """Train one model, score it on the test split, and return its numbers."""
    run = options.work / f"{options.minutes:g}min" / name.replace(", ", "_").replace(" ", "_")
    train(options, arch, run, num_steps)
    softmoe_clip("eval", run, "--suite", suite(options), "--out", run / "test.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = json.loads((run / "test.json").read_text())
    return {
        "arch": arch,
        "steps": num_steps,
        "samples_seen": max(line["samples_seen"] for line in lines if "samples_seen" in line),
        "metrics": metrics["metrics"],
        "chance": metrics["chance"],
    }


def pairs_per_second(options, arch: str) -> float:
    """Measure the speed of a short run, loading and logging included; the slow first steps weigh nothing."""
    run = options.work / f"speed_{arch}"
    train(options, arch, run, TIMED_STEPS)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return median(line["pairs_per_second"] for line in lines if "pairs_per_second" in line)


def train(options, arch: str, run: Path, num_steps: int) -> None:
    """Train, or find that it is done."""
    shards = options.work / "shards"
    settings = {
        "out": run,
        "model.arch": arch,
        "data.train": shards / "train",
        "data.val": "null" if num_steps == TIMED_STEPS else shards / "val",
        "tokenizer": options.work / "tokenizer.model",
        "steps": num_steps,
        "optim.warmup": max(1, num_steps // 10),
    }
    softmoe_clip("train", CONFIG, *(f"{key}={value}" for key, value in settings.items()))


def suite(options) -> Path:
    """Write the suite for the test split."""
    path = options.work / "suite.yaml"
    tasks = [{"kind": "retrieval", "name": "flickr8k", "data": str((options.work / "shards/test").resolve())}]
    path.write_text(json.dumps({"tasks": tasks}))
    return path


def config_value(key: str):
    """Read one value of the config that both train with."""
    import yaml

    from softmoe_clip.config import find_config

    return yaml.safe_load(find_config(CONFIG).read_text())[key]


def softmoe_clip(*arguments) -> None:
    """Run one verb in a process of its own."""
    subprocess.run([sys.executable, "-m", "softmoe_clip", *map(str, arguments)], check=True)


def table(rows: dict[str, dict]) -> str:
    """Lay the rows out as Markdown."""
    names = [f"{way}/recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    titles = " | ".join(name.replace("_to_", " to ").replace("/recall", " R").replace("_", " ") for name in names)
    lines = [
        f"| image tower | steps | minutes | {titles} |",
        "| --- |" + " ---: |" * (len(names) + 2),
    ]
    key = "retrieval/flickr8k/"
    for name, found in rows.items():
        values = " | ".join(f"{100 * found['metrics'][key + n]:.1f}" for n in names)
        lines.append(f"| {name} | {found['steps']:,} | {found['minutes']:.1f} | {values} |")
    chance = next(iter(rows.values()))["chance"]
    lines.append("| chance | | | " + " | ".join(f"{100 * chance[key + n]:.1f}" for n in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
