"""Turn pictures with captions into shards, leaving out what can't be used and saying why."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import PIL

from softmoe_clip.data_pipelines.new_folder import clear, refuse_existing
from softmoe_clip.data_pipelines.pack_partial import (
    NUM_ITEMS,
    SOURCE,
    NothingToPack,
    Partial,
    fingerprint,
    partial_folder,
)
from softmoe_clip.data_pipelines.pack_shard import Done, Job, Layout
from softmoe_clip.data_pipelines.pack_workers import write_shards
from softmoe_clip.data_pipelines.picture_bytes import Encoding
from softmoe_clip.data_pipelines.processes import usable_cores
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.shard_files import write_lines, write_synced
from softmoe_clip.data_pipelines.shard_writer import check_shard_size, finish_folder
from softmoe_clip.data_pipelines.sources import SourceItem, read_source
from softmoe_clip.data_pipelines.sources.items import Prompts, plain_prompt, share, with_roles
from softmoe_clip.data_pipelines.tar_walk import TarPart

LAYOUTS = ("img2dataset", "benchmark")
Splits = dict[str, list[SourceItem]]
Skipped = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class PackReport:
    """What `pack` wrote: samples per split, and the name, split and reason of each picture it left out."""

    out: str
    counts: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)
    classnames: tuple[str, ...] = ()


def pack(
    source: str | Path,
    out: str | Path,
    split: str | None = None,
    shard_size: int = 1000,
    holdout: float = 0.1,
    layout: Layout = "img2dataset",
    encoding: Encoding = Encoding(),
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    root: str | Path | None = None,
    prompts: Prompts | None = None,
    num_workers: int | None = None,
    roles: bool = False,
) -> PackReport:
    """Write the pictures of a source (see `read_source`) to OUT/train, OUT/val, ...; with SPLIT only that, into OUT.

    In the benchmark layout SPLIT, too, has a folder of its own. A source without splits is divided by a hash of the
    names, a share of `holdout` (0 to 1) into val; in the benchmark layout, CLIP_benchmark's, all of it is the split
    test. What can't be used is listed in skipped.jsonl beside the shards. A pack that was stopped continues where it
    was. `num_workers` (all cores) does not change the bytes. With `roles`, splits are called train, val and test
    whatever the source calls them (see `with_roles`).
    Raises ValueError where nothing is left, OUT is not empty, or a pack with other arguments is unfinished there.
    """
    refuse_existing(out)
    check_arguments(shard_size, holdout, layout, num_workers)
    found = read_source(source, image_column, caption_columns, root, prompts)
    if roles:
        found = found._replace(items=with_roles(found.items))
    if found.classnames and Path(out).absolute().is_relative_to(Path(source).absolute()):
        raise ValueError(f"{out} lies inside the source, where it would be one more class: choose another folder")
    splits = divide(found.items, source, split, holdout, layout)
    arguments = {
        "source folder or file": str(Path(source).absolute()) if Path(source).exists() else str(source),
        "split": split,
        "shard_size": shard_size,
        "holdout": holdout,
        "layout": layout,
        **asdict(encoding),
        "image_column": image_column,
        "caption_columns": list(caption_columns),
        "root": root and str(root),
        "templates": prompts and list(prompts("{}")),
        "Pillow": PIL.__version__,
        NUM_ITEMS: len(found.items),
        SOURCE: fingerprint(found.items),
    }
    plan = Plan(splits, split, shard_size, layout, encoding, found.classnames, list((prompts or plain_prompt)("{c}")))
    with partial_folder(out, arguments) as partial:
        jobs, skipped = jobs_of(plan, partial)
        already = sum(len(job.items) for job in jobs if Path(job.finished).exists())
        with progress("packing", sum(len(job.items) for job in jobs), "pictures", already) as advance:
            done = write_shards(jobs, num_workers or usable_cores(), advance)
        return finish(plan, partial, str(out), list(zip(jobs, done, strict=True)), skipped)


def check_arguments(shard_size: int, holdout: float, layout: str, num_workers: int | None) -> None:
    """Refuse values out of range before anything is read."""
    check_shard_size(shard_size)
    if not 0 < holdout < 1:
        raise ValueError(f"holdout is {holdout}: give the share of pictures for val, between 0 and 1")
    if layout not in LAYOUTS:
        raise ValueError(f"the format is {layout!r}: choose img2dataset or benchmark")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"workers is {num_workers}: give at least 1")


class Plan(NamedTuple):
    """What goes where: the pictures by split, of which only `split` is wanted if that is given."""

    splits: Splits
    split: str | None
    shard_size: int
    layout: Layout
    encoding: Encoding
    classnames: tuple[str, ...]
    templates: list[str]

    def folder(self, partial: Partial, name: str) -> Path:
        """A split that is wanted alone lies in OUT itself, except in CLIP_benchmark's layout."""
        alone = self.split is not None and self.layout == "img2dataset"
        return partial.shards if alone else partial.shards / name


def jobs_of(plan: Plan, partial: Partial) -> tuple[list[Job], Skipped]:
    """Cut each split into shards; what is known to be of no use before any picture is read comes back beside them."""
    jobs, skipped = [], {}
    for name, items in plan.splits.items():
        problems = [item.problem or (None if item.captions else "no caption") for item in items]
        usable = [item for item, problem in zip(items, problems, strict=True) if problem is None]
        skipped[name] = [
            {"name": item.name, "split": name, "reason": problem}
            for item, problem in zip(items, problems, strict=True)
            if problem is not None
        ]
        folder = plan.folder(partial, name)
        folder.mkdir(parents=True, exist_ok=True)
        for number, first in enumerate(range(0, len(usable), plan.shard_size)):
            note = partial.finished / f"{name}-{number:05d}.json"
            cut = usable[first : first + plan.shard_size]
            jobs.append(Job(str(folder), str(note), plan.layout, name, number, first, cut, plan.encoding))
    return jobs, skipped


def divide(items: list[SourceItem], source: str | Path, split: str | None, holdout: float, layout: Layout) -> Splits:
    """Sort the pictures into splits: the source's own, else train and val by a hash of the names."""
    names = sorted({item.split for item in items if item.split})
    if bad := next((name for name in names if not re.fullmatch(r"\w[\w.-]*", name)), None):
        raise ValueError(f"{source} has a split named {bad!r}: a split's name becomes a folder, use letters and digits")
    if split is not None:
        if not re.fullmatch(r"\w[\w.-]*", split):
            raise ValueError(f"the split {split!r} is no name: use letters and digits")
        if names and split not in names:
            raise ValueError(f"{source} has no split {split!r}: it has {', '.join(names)}")
        return {split: [item for item in items if not names or (item.split or "train") == split]}
    if names:
        splits: Splits = {}
        for item in items:
            splits.setdefault(item.split or "train", []).append(item)
        return splits
    if layout == "benchmark":
        return {"test": items}
    if len(items) < 2:
        raise ValueError(f"{source} has one picture, too few to divide into train and val: use --split train")
    # By a hash, so that a picture stays where it is when others are added.
    order = sorted(items, key=lambda item: share(item.name))
    num_val = min(max(1, sum(share(item.name) < holdout for item in items)), len(items) - 1)
    val = {item.name for item in order[:num_val]}
    return {
        "train": [item for item in items if item.name not in val],
        "val": [item for item in items if item.name in val],
    }


def finish(plan: Plan, partial: Partial, out: str, shards: list[tuple[Job, Done]], skipped: Skipped) -> PackReport:
    """Write what each split and the whole have once, and drop splits of which nothing is left."""
    report, problems, lost = PackReport(out, classnames=plan.classnames), [], []
    for name in plan.splits:
        folder = plan.folder(partial, name)
        done = [result for job, result in shards if job.split == name]
        left_out = skipped[name] + [entry for result in done for entry in result.skipped]
        report.skipped.extend(left_out)
        if count := sum(len(result.part.keys) for result in done):
            report.counts[name] = count
            finish_split(folder, plan.layout, [result.part for result in done], left_out)
        else:
            first = f"{left_out[0]['name']}: {left_out[0]['reason']}" if left_out else "there are none"
            problems.append(f"no picture for the split {name} can be used ({first})")
            lost += left_out
            clear(folder)
            if folder != partial.shards:
                folder.rmdir()
    if not report.counts:
        raise NothingToPack(f"{problems[0]}: correct the source, nothing was written")
    write_skipped(partial.shards, lost)
    write_class_files(partial.shards, plan)
    return report


def finish_split(folder: Path, layout: Layout, parts: list[TarPart], left_out: list[dict[str, str]]) -> None:
    """Write the counts, the index, what was left out, and the number of shards where CLIP_benchmark asks for it."""
    finish_folder(folder, parts)
    write_skipped(folder, left_out)
    if layout == "benchmark":
        write_synced(folder / "nshards.txt", f"{len(parts)}\n")


def write_skipped(folder: Path, entries: list[dict[str, str]]) -> None:
    """List what was left out; those of a split of which nothing is left stand beside the other splits."""
    if entries:
        write_lines(folder / "skipped.jsonl", entries)


def write_class_files(folder: Path, plan: Plan) -> None:
    """Write classnames.txt, and in CLIP_benchmark's layout its templates, or that this is a set for retrieval."""
    if plan.classnames:
        write_synced(folder / "classnames.txt", "".join(f"{name}\n" for name in plan.classnames))
    if plan.layout == "benchmark" and plan.classnames:
        lines = "".join(f"{template}\n" for template in plan.templates)
        write_synced(folder / "zeroshot_classification_templates.txt", lines)
    elif plan.layout == "benchmark":
        write_synced(folder / "dataset_type.txt", "retrieval\n")
