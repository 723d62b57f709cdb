"""Time LiT from cached features against the same training with the frozen image tower in the loop; pairs per second.

    python benchmarks/lit_features.py FLICKR8K_FOLDER

Both read the same captions, train the same text tower on the same batches without augmentation, and get the same losses
(tests/test_trunk.py); one computes the features of the pictures in every step, the other one reads what `embed
--features trunk` wrote. Each lives in a process of its own; they take turns, one whole step at a time, reading and
tokenizing included, and medians are compared. Results go into a JSON beside this file.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from machine import machine, write_results
from turns import TUNED, serve, take_turns

CONFIG = "configs/lit_features.yaml"
# Architecture: pairs in a batch. The demo's small towers, and S/16 at 224 pixels with CLIP's text tower of its width.
BATCHES = {"SoftMoE-demo": 64, "PlainViT-S-16": 32}
IN_LOOP, CACHED = "tower in the loop", "cached features"


def main() -> None:
    options = read_options()
    if options.work_on:
        work(options, *options.work_on.split(": "))
        return
    import torch

    for arch in BATCHES:
        prepare(options, arch)
    seconds = take_turns([(f"{arch}: {way}", TUNED) for arch in BATCHES for way in (IN_LOOP, CACHED)], options.rounds)
    rows = []
    for arch, batch_size in BATCHES.items():
        speed = {way: batch_size / seconds[f"{arch}: {way}", TUNED] for way in (IN_LOOP, CACHED)}
        rows.append({"arch": arch, "batch_size": batch_size, "pairs_per_second": speed})
        rows[-1]["ratio"] = speed[CACHED] / speed[IN_LOOP]
        told = ", ".join(f"{way} {value:.1f}" for way, value in speed.items())
        print(f"{arch}: {told} pairs per second, {rows[-1]['ratio']:.1f} times as fast")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {"machine": machine(device), "torch": torch.__version__, "rounds": options.rounds, "rows": rows}
    write_results(options.out, {device: found})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a folder with captions.json and pictures")
    parser.add_argument("--pictures", type=int, default=256, help="how many of them to train on")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, default=Path("runs/lit_features"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/lit_features.json")
    parser.add_argument("--work-on", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(options: argparse.Namespace, arch: str) -> None:
    """Pack the pictures, write a fresh model and the features that its trunk gives; what is there is kept."""
    from softmoe_clip.models.store import save
    from softmoe_clip.training.build import build

    shards, place = options.work / "shards", options.work / arch
    if not shards.exists():
        listed = json.loads((options.source / "captions.json").read_text())
        listed["image_dir"] = str((options.source / listed["image_dir"]).resolve())
        listed["images"] = [image for image in listed["images"] if image["split"] == "train"][: options.pictures]
        some = options.work / "some"
        some.mkdir(parents=True, exist_ok=True)
        (some / "captions.json").write_text(json.dumps(listed))
        softmoe_clip("pack", some, shards)
        softmoe_clip("train-tokenizer", shards / "train", options.work / "tokenizer.model", "--vocab-size", "2000")
    if not (place / "features").exists():
        save(build(config(options, arch)), place / "model")
        softmoe_clip("embed", place / "model", shards / "train", place / "features", "--features", "trunk")


def config(options: argparse.Namespace, arch: str, **settings):
    """Return the packaged config with other towers and data."""
    from softmoe_clip.config import TrainConfig, find_config
    from softmoe_clip.data_pipelines.strict import load_strict

    settings = {
        "init": "null",
        "model.arch": arch,
        "data.train": options.work / "shards/train",
        "data.val": "null",
        "data.image_features": "null",
        "tokenizer": options.work / "tokenizer.model" if arch == "SoftMoE-demo" else "open_clip",
        "batch_size": BATCHES[arch],
    } | settings
    return load_strict(TrainConfig, find_config(CONFIG), [f"{key}={value}" for key, value in settings.items()])


def work(options: argparse.Namespace, arch: str, way: str) -> None:
    """Train one of the two ways, in its own process, a step whenever it is asked for one."""
    import torch

    from softmoe_clip.data_pipelines.loader import train_batches
    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.data_pipelines.transforms import normalise
    from softmoe_clip.training.build import build, run_picture, run_towers
    from softmoe_clip.training.freeze import train_mode
    from softmoe_clip.training.losses import LOSSES
    from softmoe_clip.training.optim import adamw

    place = options.work / arch
    features = place / "features" if way == CACHED else "null"
    run = config(options, arch, **{"init": place / "model", "data.image_features": features})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards, loaded = ShardSet.open(run.data.train), build(run)
    picture = run_picture(run, loaded, shards)
    optimizer = adamw(loaded.model.to(device), run.optim)
    towers, preprocess = run_towers(run, loaded.model), loaded.preprocess_cfg
    train_mode(towers)
    batches = iter(
        train_batches(
            shards,
            loaded.tokenizer,
            picture=picture,
            batch_size=run.batch_size,
            seed=0,
            num_batches=run.last_step,
            num_workers=0,
        )
    )

    def step() -> float:
        begin = perf_counter()
        batch = next(batches)
        images = normalise(batch.images.to(device), preprocess["mean"], preprocess["std"])
        out = towers(images, batch.token_ids.to(device))
        LOSSES[run.loss](out["image_features"], out["text_features"], out["logit_scale"], None).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - begin

    serve(step)


def softmoe_clip(*arguments) -> None:
    """Run one verb in a process of its own."""
    subprocess.run([sys.executable, "-m", "softmoe_clip", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
