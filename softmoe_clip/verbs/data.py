"""The verbs on pictures, captions and shards."""

from pathlib import Path
from typing import Annotated

import typer


def pack(
    source: str,
    out: Path,
    split: Annotated[str | None, typer.Option(help="only this split of the source, straight into OUT")] = None,
    shard_size: Annotated[int, typer.Option(help="pictures in a shard")] = 1000,
    shorter_side: Annotated[int | None, typer.Option(help="shrink larger pictures to this many pixels")] = None,
    encode: Annotated[str, typer.Option(help="keep the bytes where possible, or jpeg, png, webp for all")] = "keep",
    quality: Annotated[int | None, typer.Option(help="of JPEG (95) or WebP (90), 1 to 100")] = None,
    format: Annotated[str, typer.Option(help="img2dataset, or benchmark for CLIP_benchmark")] = "img2dataset",
    image_column: Annotated[str | None, typer.Option(help="the table's column of pictures")] = None,
    caption_column: Annotated[list[str] | None, typer.Option(help="a column of captions; may be repeated")] = None,
    templates: Annotated[str | None, typer.Option(help="captions of classes: openai, simple or a .txt file")] = None,
    root: Annotated[Path | None, typer.Option(help="folder of a table's pictures, or of a torchvision set")] = None,
    workers: Annotated[int | None, typer.Option(help="cores to use; all without it")] = None,
):
    """Turn pictures with captions into shards; stopped in the middle, the same command continues.

    SOURCE: a folder of X.jpg + X.txt, a table (CSV, TSV, JSONL, Parquet, COCO's or Karpathy's JSON), class folders,
    shards, or torchvision:NAME.

    Example: softmoe-clip pack my_pictures shards
    """
    from softmoe_clip.data_pipelines.pack import pack
    from softmoe_clip.data_pipelines.picture_bytes import Encoding
    from softmoe_clip.eval.templates import fill, find_templates

    prompts = None
    if templates is not None:
        found = find_templates(templates)

        def prompts(classname: str) -> list[str]:
            return [fill(template, classname) for template in found]

    report = pack(
        source,
        out,
        split=split,
        shard_size=shard_size,
        layout=format,
        encoding=Encoding(encode, quality, shorter_side),
        image_column=image_column,
        caption_columns=caption_column or (),
        root=root,
        prompts=prompts,
        num_workers=workers,
    )
    for name, count in report.counts.items():
        print(f"{count:8,} pictures  {name}")
    if report.classnames:
        print(f"{len(report.classnames):8,} classes   {', '.join(report.classnames[:5])}, ...")
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
