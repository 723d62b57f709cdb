"""The verbs on pictures, captions and shards."""

from pathlib import Path
from typing import Annotated

import typer

from softmoe_clip.verbs.arguments import Jobs, Shards


def pack(
    source: Annotated[str, typer.Argument(help="pictures with captions, see above")],
    out: Annotated[Path, typer.Argument(help="folder for the shards: OUT/train, OUT/val, ...")],
    split: Annotated[str | None, typer.Option(help="only this split, straight into OUT (benchmark: OUT/SPLIT)")] = None,
    shard_size: Annotated[int, typer.Option(help="pictures in a shard")] = 1000,
    shorter_side: Annotated[int | None, typer.Option(help="shrink larger pictures to this many pixels")] = None,
    encode: Annotated[str, typer.Option(help="keep the bytes where possible, or jpeg, png, webp for all")] = "keep",
    quality: Annotated[int | None, typer.Option(help="of JPEG (95) or WebP (90), 1 to 100")] = None,
    format: Annotated[str, typer.Option(help="img2dataset, or benchmark for CLIP_benchmark")] = "img2dataset",
    image_column: Annotated[str | None, typer.Option(help="the table's column of pictures")] = None,
    caption_column: Annotated[list[str] | None, typer.Option(help="a column of captions; may be repeated")] = None,
    templates: Annotated[
        str | None, typer.Option(help="captions for class folders: openai, simple, or a .txt file of templates")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="folder of a table's pictures, or of a torchvision set")] = None,
    workers: Annotated[int | None, typer.Option(help="processes that pack; one per core if not given")] = None,
):
    """Turn pictures with captions into shards.

    SOURCE: a folder of X.jpg + X.txt, a table (CSV, TSV, JSONL, Parquet, COCO's or Karpathy's JSON), class folders,
    shards, or torchvision:NAME. Stopped in the middle, the same command continues.

    Example: softmoe-clip pack my_pictures shards
    """
    from softmoe_clip.data_pipelines.pack import pack
    from softmoe_clip.data_pipelines.picture_bytes import Encoding
    from softmoe_clip.eval.templates import prompts_of

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
        prompts=None if templates is None else prompts_of(templates),
        num_workers=workers,
    )
    for name, count in report.counts.items():
        print(f"{count:8,} pictures  {name}")
    if report.classnames:
        more = ", ..." if len(report.classnames) > 5 else ""
        print(f"{len(report.classnames):8,} classes   {', '.join(report.classnames[:5])}{more}")
    if report.skipped:
        print(f"{len(report.skipped):8,} skipped   listed in skipped.jsonl")


def check(
    shards: Shards,
    against: Annotated[str | None, typer.Option(help="shards that must not share pictures with these")] = None,
    out: Annotated[Path | None, typer.Option(help="list all findings in this .json, and in a .jsonl beside it")] = None,
    fix: Annotated[Path | None, typer.Option(help="write clean shards to this folder")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 for warnings, too")] = False,
    processes: Annotated[int, typer.Option(help="processes that will train on the shards")] = 1,
    workers: Annotated[int, typer.Option(help="loader workers of each of them")] = 0,
    jobs: Jobs = None,
):
    """Read every sample of shards and list what is wrong.

    The exit status is 1 where there are errors.

    Example: softmoe-clip check shards/train --against shards/val
    """
    from softmoe_clip.data_pipelines.check import check
    from softmoe_clip.data_pipelines.clean import write_clean
    from softmoe_clip.data_pipelines.findings import ledger_beside, print_findings, write_findings
    from softmoe_clip.data_pipelines.new_folder import refuse_existing

    if out is not None:
        ledger_beside(out)
    if fix is not None:
        refuse_existing(fix)
    report = check(shards, against, processes, workers, jobs)
    if report.findings:
        print_findings(report.findings)
    num_warnings = len(report.findings) - report.num_errors
    print(
        f"{report.num_samples:,} samples, {len(report.findings):,} findings"
        + (f": {report.num_errors:,} errors, {num_warnings:,} warnings" if report.findings else "")
    )
    if out is not None:
        about = {"shards": shards, "against": against, **report.summary()}
        print(f"all findings: {out} and {write_findings(out, about, report.findings)}")
    if fix is not None:
        cleaned = write_clean(report, fix)
        print(
            f"{cleaned.num_written:,} samples in {fix}, {cleaned.num_dropped:,} left out, "
            f"{cleaned.num_joined:,} joined with a sample that has the same picture"
        )
    raise typer.Exit(1 if report.num_errors or (strict and report.findings) else 0)


def stats(
    shards: Shards,
    out: Annotated[Path, typer.Argument(help="folder for a page and its pictures")],
    tokenizer: Annotated[
        str | None, typer.Option(help="count ids with this tokenizer: a sentencepiece file, or a folder")
    ] = None,
    context_length: Annotated[int | None, typer.Option(help="ids of a caption that the model takes")] = None,
    jobs: Jobs = None,
):
    """Draw what is in shards: captions, picture sizes, words.

    Example: softmoe-clip stats shards/train data_stats
    """
    from softmoe_clip.data_pipelines.new_folder import refuse_existing
    from softmoe_clip.data_pipelines.stats import count, print_stats
    from softmoe_clip.report.data_stats import write_stats

    refuse_existing(out)
    counted = count(shards, tokenizer, context_length, jobs)
    page = write_stats(counted, shards, out)
    print_stats(counted)
    print(f"{counted.num_samples:,} samples in {counted.num_shards:,} shards: {page}")


def train_tokenizer(
    shards: Shards,
    out: Annotated[Path, typer.Argument(help="file to write, as in tokenizer.model")],
    vocab_size: Annotated[int, typer.Option(help="pieces; fewer where captions hold fewer")] = 2000,
):
    """Make a sentencepiece tokenizer from captions.

    Example: softmoe-clip train-tokenizer shards/train tokenizer.model
    """
    from softmoe_clip.data_pipelines.samples import all_captions
    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer

    if out.is_dir():
        raise ValueError(f"{out} is a folder: give the file to write, as {out / 'tokenizer.model'}")
    train_tokenizer(all_captions(ShardSet.open(shards)), out, vocab_size)
