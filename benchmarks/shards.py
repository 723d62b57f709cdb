"""Measure what many shards cost: how well windows mix them, how fast they open, what reading ahead gives a cold disk.

    python benchmarks/shards.py --work /tmp/shards

Writes 10,000 tiny tars and one file of --cold-mib MiB below --work, and removes them. Results go into a JSON beside
this file.
"""

import argparse
import json
import os
import random
import shutil
import tarfile
from pathlib import Path
from time import perf_counter

from machine import machine, write_results

from softmoe_clip.data_pipelines.order import WindowedOrder, mixing
from softmoe_clip.data_pipelines.read_ahead import STEP
from softmoe_clip.data_pipelines.tar_index import ShardSet

READ = 32 * 1024  # about one picture


def mixing_table(num_shards: int, shard_size: int) -> dict[str, dict[str, float]]:
    """Return `mixing` by window and batch size; 1 is a full shuffle."""
    return {
        f"window {window or 'all'}": {
            f"batch {batch_size}": round(
                mixing(WindowedOrder(0, (shard_size,) * num_shards, window), batch_size, 50), 1
            )
            for batch_size in (256, 4096)
        }
        for window in (1, 8, 32, 0)
    }


def opening_seconds(folder: Path, num_shards: int, shard_size: int) -> dict[str, float]:
    """Write tiny tars; return the seconds until they are open, without and with their index."""
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        names = [f"{shard:05d}{sample:04d}.{kind}" for sample in range(shard_size) for kind in ("jpg", "txt")]
        (folder / f"{shard:05d}.tar").write_bytes(b"".join(map(member, names)) + bytes(2 * tarfile.BLOCKSIZE))
    seconds = []
    for _ in range(4):
        begin = perf_counter()
        ShardSet.open(str(folder))
        seconds.append(round(perf_counter() - begin, 2))
    return {"first": seconds[0], "later, median": sorted(seconds[1:])[1]}


def member(name: str) -> bytes:
    """Return a member of three bytes."""
    info = tarfile.TarInfo(name)
    info.size = 3
    return info.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(tarfile.BLOCKSIZE, b"\0")


def cold_reads(file: Path, mib: int) -> dict[str, int]:
    """Return MB per second of reads at random places of a file that is not in memory, with and without a word ahead."""
    with open(file, "wb") as out:
        for _ in range(mib):
            out.write(os.urandom(2**20))
        out.flush()
        os.fsync(out.fileno())
    places = list(range(0, mib * 2**20, READ))
    random.Random(0).shuffle(places)
    descriptor, speeds = os.open(file, os.O_RDONLY), {}
    for name in ("random", "random, told ahead"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        begin = perf_counter()
        for offset in range(0, mib * 2**20 if "told" in name else 0, STEP):
            os.posix_fadvise(descriptor, offset, STEP, os.POSIX_FADV_WILLNEED)
        for place in places:
            os.pread(descriptor, READ, place)
        speeds[name] = round(mib * 2**20 / 1e6 / (perf_counter() - begin))
    os.close(descriptor)
    return speeds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder to make")
    parser.add_argument("--cold-mib", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/shards.json")
    options = parser.parse_args()
    try:
        results = {
            "machine": machine(),
            "seconds to open 10,000 shards of 10 samples": opening_seconds(options.work / "tars", 10_000, 10),
            "cold reads, MB/s": cold_reads(options.work / "cold", options.cold_mib),
            "mixing, 1,000 shards of 1,000": mixing_table(1000, 1000),
        }
    finally:
        shutil.rmtree(options.work, ignore_errors=True)
    write_results(options.out, results)
    print(json.dumps(results, indent=1))
