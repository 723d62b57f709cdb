"""Turn pictures with captions into shards, leaving out what can't be used and saying why."""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from softmoe_clip.data_pipelines.images import (
    JPEG_FORMATS,
    largest_shrink,
    load_pixels,
    load_rgb,
    open_picture,
    orientation,
)
from softmoe_clip.data_pipelines.new_folder import new_folder, refuse_existing
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.shard_writer import ShardWriter, write_synced
from softmoe_clip.data_pipelines.sources import SourceItem, read_source

MAX_FILE_BYTES = 256 * 1024**2
KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
LOSSY_FORMATS = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}
NUM_THREADS = 4  # Pillow decodes without Python's lock
CHUNK = 64


@dataclass(frozen=True)
class PackReport:
    """What `pack` wrote: samples per split, and the name, split and reason of each picture it left out."""

    out: str
    counts: dict[str, int] = field(default_factory=dict)
    skipped: list[dict[str, str]] = field(default_factory=list)


class Picture(NamedTuple):
    """A picture as it goes into a shard."""

    data: bytes
    extension: str
    width: int
    height: int


def pack(
    source: str | Path, out: str | Path, split: str | None = None, shard_size: int = 1000, holdout: float = 0.1
) -> PackReport:
    """Write the pictures of a source (see `read_source`) to OUT/train, OUT/val, ...; with SPLIT only that, into OUT.

    A source without splits is divided by a hash of the names, a share of `holdout` (0 to 1) into val. What can't be
    used is listed in skipped.jsonl beside the shards. Raises ValueError where nothing is left, or OUT is not empty.
    """
    refuse_existing(out)
    if not 0 < holdout < 1:
        raise ValueError(f"holdout is {holdout}: give the share of pictures for val, between 0 and 1")
    splits = _divide(read_source(source).items, source, split, holdout)
    report = PackReport(str(out))
    with progress("packing", sum(map(len, splits.values())), "pictures") as advance:
        if split is not None:
            _write_split(Path(out), split, splits[split], shard_size, advance, report)
            return report
        with new_folder(out) as folder:
            problems = []
            for name, items in splits.items():
                try:
                    _write_split(folder / name, name, items, shard_size, advance, report)
                except NothingToPack as problem:
                    problems.append(problem)
            if not report.counts:
                raise problems[0]
    return report


class NothingToPack(ValueError):
    """Not one picture of a split can be used."""


def _divide(
    items: list[SourceItem], source: str | Path, split: str | None, holdout: float
) -> dict[str, list[SourceItem]]:
    names = sorted({item.split for item in items if item.split})
    if bad := next((name for name in names if not re.fullmatch(r"\w[\w.-]*", name)), None):
        raise ValueError(f"{source} has a split named {bad!r}: a split's name becomes a folder, use letters and digits")
    if split is not None:
        if names and split not in names:
            raise ValueError(f"{source} has no split {split!r}: it has {', '.join(names)}")
        return {split: [item for item in items if not names or (item.split or "train") == split]}
    if names:
        splits: dict[str, list[SourceItem]] = {}
        for item in items:
            splits.setdefault(item.split or "train", []).append(item)
        return splits
    if len(items) < 2:
        raise ValueError(f"{source} has one picture, too few to divide into train and val: use --split train")
    # By a hash, so that a picture stays where it is when others are added.
    order = sorted(items, key=lambda item: _share(item.name))
    num_val = min(max(1, sum(_share(item.name) < holdout for item in items)), len(items) - 1)
    val = {item.name for item in order[:num_val]}
    return {
        "train": [item for item in items if item.name not in val],
        "val": [item for item in items if item.name in val],
    }


def _share(name: str) -> float:
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8]) / 2**64


def _write_split(
    out: Path, split: str, items: list[SourceItem], shard_size: int, advance: Callable[..., None], report: PackReport
) -> None:
    skipped = []
    try:
        with ShardWriter(out, shard_size) as writer:
            for item, picture in _prepared(items):
                if isinstance(picture, str):
                    skipped.append({"name": item.name, "split": split, "reason": picture})
                else:
                    size = {"width": picture.width, "height": picture.height}
                    extra = {**item.extra, "file_name": item.name, **size}
                    writer.add(picture.data, picture.extension, item.captions, extra)
                advance()
            if not writer.num_samples:
                raise NothingToPack(_nothing(split, skipped))
            if skipped:
                lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skipped)
                write_synced(writer.folder / "skipped.jsonl", lines)
            report.counts[split] = writer.num_samples
    finally:
        report.skipped.extend(skipped)


def _nothing(split: str, skipped: list[dict[str, str]]) -> str:
    first = f"{skipped[0]['name']}: {skipped[0]['reason']}" if skipped else "there are none"
    return f"no picture for the split {split} can be used ({first}): correct the source, nothing was written"


def _prepared(items: list[SourceItem]) -> Iterator[tuple[SourceItem, Picture | str]]:
    """Yield every item with its picture, or with the reason why it can't be used; in order, a chunk in memory."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            yield from zip(chunk, threads.map(_prepare, chunk), strict=True)


def _prepare(item: SourceItem) -> Picture | str:
    if item.problem is not None:
        return item.problem
    if not item.captions:
        return "no caption"
    try:
        if (size := item.path.stat().st_size) > MAX_FILE_BYTES:
            return f"file of {size:,} bytes is over the limit of {MAX_FILE_BYTES:,}"
        return for_shard(item.path.read_bytes())
    except OSError as error:
        return f"can't be read: {error.strerror or error}"
    except ValueError as error:
        return str(error)


def for_shard(data: bytes) -> Picture:
    """Check that a picture decodes whole; keep its bytes where any decoder shows them upright in RGB, else encode anew.

    JPEG and the like become JPEG of quality 95 with full colour resolution, all else PNG. Raises ValueError.
    """
    picture = open_picture(data)
    if picture.format not in JPEG_FORMATS:
        load_pixels(picture)  # before any look at EXIF, which Pillow can't reach without decoding a PNG
    if _is_plain(picture):
        width, height = picture.size
        extension = KEPT_FORMATS[picture.format]
        load_rgb(picture, largest_shrink(min(picture.size), 8))
        return Picture(data, extension, width, height)
    lossy = picture.format in LOSSY_FORMATS
    rgb = load_rgb(picture)
    return Picture(_encoded(rgb, lossy), "jpg" if lossy else "png", rgb.width, rgb.height)


def _is_plain(picture: Image.Image) -> bool:
    return (
        picture.format in KEPT_FORMATS
        and picture.mode in ("RGB", "L")
        and not picture.has_transparency_data
        and (picture.format == "MPO" or getattr(picture, "n_frames", 1) == 1)
        and orientation(picture) == 1
    )


def _encoded(rgb: Image.Image, lossy: bool) -> bytes:
    file = io.BytesIO()
    try:
        if lossy:
            rgb.save(file, "JPEG", quality=95, subsampling=0)
        else:
            rgb.save(file, "PNG")
    except OSError as error:
        raise ValueError(f"picture does not encode: {error}") from error
    return file.getvalue()
