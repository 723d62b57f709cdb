"""Measure whether the memory of a loader worker stays flat: training batches of one worker over 100,000 samples.

    python benchmarks/worker_memory.py --work /tmp/worker_memory

Writes shards of 1,000 small JPEGs (1 GB) below --work and removes them. Every sample is read once, in windows of 8
shards. Resident memory holds what the worker shares with the process it was forked from, private memory does not; the
growth is from the mean of the second tenth of the samples to that of the last one. Linux only, since it reads /proc.
Results go into a JSON beside this file.
"""

import argparse
import io
import multiprocessing
import re
import shutil
from itertools import count
from pathlib import Path
from time import perf_counter

import numpy as np
from machine import machine, write_results

IMAGE_SIZE, BATCH_SIZE, WINDOW, SHARD_SIZE = 64, 100, 8, 1000
NUM_PICTURES = 500  # different ones, which come again under other keys
EVERY = 1000  # samples from one look at the worker to the next
RESIDENT, PRIVATE = "resident MiB", "private MiB"


def main() -> None:
    import torch

    options = read_options()
    if options.samples < 20 * EVERY:
        raise SystemExit(f"--samples is {options.samples}: give {20 * EVERY} or more")
    try:
        if not options.work.exists():
            write_shards(options.work, options.samples)
        begin = perf_counter()
        looks = memory_over_samples(options.work, options.samples)
        speed = round(options.samples / (perf_counter() - begin))
    finally:
        if not options.keep:
            shutil.rmtree(options.work, ignore_errors=True)
    tenth = len(looks) // 10
    rows = looks[::tenth]
    for row in rows:
        print(f"{row['samples']:8,} samples {row[RESIDENT]:8.1f} {RESIDENT} {row[PRIVATE]:8.1f} {PRIVATE}")
    second, last = looks[tenth : 2 * tenth], looks[-tenth:]
    growth = {name: round(mean(last, name) - mean(second, name), 2) for name in (RESIDENT, PRIVATE)}
    print("growth: " + ", ".join(f"{mib:+.2f} {name}" for name, mib in growth.items()))
    found = {"machine": machine(), "torch": torch.__version__, "samples_per_second": speed}
    write_results(options.out, found | {"growth": growth, "rows": rows})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder to make; shards that are there are read")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--keep", action="store_true", help="leave the shards there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/worker_memory.json")
    return parser.parse_args()


def write_shards(folder: Path, num_samples: int) -> None:
    """Pack drawn JPEGs of many sizes, each with a few captions of its own."""
    from softmoe_clip.data_pipelines.progress import progress
    from softmoe_clip.data_pipelines.shard_writer import ShardWriter

    pictures = [jpeg(seed) for seed in range(NUM_PICTURES)]
    with ShardWriter(folder, SHARD_SIZE) as writer, progress("writing", num_samples, "samples") as advance:
        for number in range(num_samples):
            captions = [f"caption {number} {'longer ' * (number % 17)}", f"other caption {number}"]
            writer.add(pictures[number % NUM_PICTURES], "jpg", captions, {"url": f"http://example.org/{number}.jpg"})
            advance()


def jpeg(seed: int) -> bytes:
    """Draw soft blobs of 80 to 240 pixels a side."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(80, 241, 2).tolist())
    blobs = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
    file = io.BytesIO()
    blobs.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=int(rng.integers(70, 96)))
    return file.getvalue()


def memory_over_samples(shards: Path, num_samples: int) -> list[dict]:
    """Read every sample once with one worker, and look at its memory now and then."""
    from softmoe_clip.data_pipelines.loader import train_batches
    from softmoe_clip.data_pipelines.pictures import RandomCrop
    from softmoe_clip.data_pipelines.progress import progress
    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.data_pipelines.tokenizers import open_clip_tokenizer
    from softmoe_clip.data_pipelines.transforms import Augment

    batches = train_batches(
        ShardSet.open(str(shards)),
        open_clip_tokenizer(),
        picture=RandomCrop(IMAGE_SIZE, Augment(crop_scale=(0.05, 1.0), flip=True)),
        batch_size=BATCH_SIZE,
        seed=0,
        num_batches=num_samples // BATCH_SIZE,
        num_workers=1,
        window=WINDOW,
    )
    looks = []
    with progress("reading", num_samples, "samples") as advance:
        for samples, batch in zip(count(BATCH_SIZE, BATCH_SIZE), batches, strict=False):
            assert not batch.replaced
            advance(BATCH_SIZE)
            if samples == BATCH_SIZE or samples % EVERY == 0:
                (worker,) = multiprocessing.active_children()
                looks.append({"samples": samples, **memory_of(worker.pid)})
    return looks


def memory_of(process: int) -> dict[str, float]:
    """Return the MiB that a process has in memory: all, and what nobody shares."""
    kib = re.findall(r"^(\w+): +(\d+) kB$", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    sizes = {name: int(size) / 1024 for name, size in kib}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {RESIDENT: round(sizes["Rss"], 1), PRIVATE: round(private, 1)}


def mean(looks: list[dict], name: str) -> float:
    return sum(look[name] for look in looks) / len(looks)


if __name__ == "__main__":
    main()
