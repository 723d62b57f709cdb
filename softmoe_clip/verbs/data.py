"""The verbs on pictures, captions and shards."""

from pathlib import Path
from typing import Annotated

import typer


def pack(
    source: str,
    out: Path,
    split: Annotated[str | None, typer.Option(help="only this split of the source, straight into OUT")] = None,
    shard_size: Annotated[int, typer.Option(help="pictures in a shard")] = 1000,
):
    """Turn pictures with captions into shards.

    Example: softmoe-clip pack my_pictures shards
    """
    from softmoe_clip.data_pipelines.pack import pack

    report = pack(source, out, split=split, shard_size=shard_size)
    for name, count in report.counts.items():
        print(f"{count:8,} pictures  {name}")
    if report.skipped:
        print(f"{len(report.skipped):8,} skipped   listed in skipped.jsonl")


def check(shards: str):
    """Read every sample of a shard set once and list what is wrong.

    Example: softmoe-clip check shards/train
    """
    from softmoe_clip.data_pipelines.check import check

    report = check(shards)
    for finding in report.findings:
        print(f"{finding['severity']}  {finding['shard']}  {finding['key']}  {finding['reason']}")
    print(f"{report.num_samples:,} samples, {len(report.findings):,} findings")
    raise typer.Exit(1 if any(f["severity"] == "error" for f in report.findings) else 0)


def train_tokenizer(shards: str, out: Path, vocab_size: Annotated[int, typer.Option(help="pieces")] = 2000):
    """Make a sentencepiece tokenizer from the captions of shards.

    Example: softmoe-clip train-tokenizer shards/train tokenizer.model
    """
    from softmoe_clip.data_pipelines.samples import all_captions
    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.data_pipelines.tokenizers import train_tokenizer

    train_tokenizer(all_captions(ShardSet.open(shards)), out, vocab_size)
