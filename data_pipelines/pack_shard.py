"""Write one shard of a source: the same bytes wherever and whenever it is done, and done once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from softmoe_clip.data_pipelines.picture_bytes import Encoding, Picture, for_shard
from softmoe_clip.data_pipelines.shard_files import ShardFiles, members_of, write_synced
from softmoe_clip.data_pipelines.sources import SourceItem
from softmoe_clip.data_pipelines.tar_walk import TarPart, index_tar

MAX_FILE_BYTES = 256 * 1024**2
CHUNK = 64  # pictures in memory
Layout = Literal["img2dataset", "benchmark"]


class Job(NamedTuple):
    """One shard to be written: its items are numbers `first`, `first + 1`, ... of the split."""

    folder: str
    finished: str  # the file that says it is done
    layout: Layout
    split: str
    number: int
    first: int
    items: list[SourceItem]
    encoding: Encoding

    @property
    def name(self) -> str:
        return f"{self.number:05d}" if self.layout == "img2dataset" else str(self.number)

    def key(self, index: int) -> str:
        """Count within the shard as img2dataset does, or within the split as CLIP_benchmark does."""
        return f"{self.number:05d}{index:04d}" if self.layout == "img2dataset" else f"s{self.first + index:07d}"


class Done(NamedTuple):
    """What a finished shard holds, and what was left out of it."""

    part: TarPart
    skipped: list[dict[str, str]]


def write_shard(job: Job, num_threads: int, advance: Callable[[int], None]) -> Done:
    """Write the shard, unless an earlier process did: its files are then compared with the hashes it left."""
    if (done := read_finished(job)) is not None:
        return done
    shard, skipped = ShardFiles(Path(job.folder), job.name), []
    try:
        for index, (item, picture) in enumerate(prepared(job.items, job.encoding, num_threads)):
            key = job.key(index)
            if isinstance(picture, str):
                skipped.append({"name": item.name, "split": job.split, "reason": picture})
                caption = item.captions[0] if item.captions else ""
                shard.leave_out(key, picture, {"url": item.extra.get("url", item.name), "caption": caption})
            else:
                shard.add(key, *sample(job, key, item, picture))
            advance(1)
        part = shard.close()
    finally:
        shard.abandon()
    write_finished(job, shard.sha256, skipped)
    return Done(part, skipped)


def sample(job: Job, key: str, item: SourceItem, picture: Picture) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Put a picture and what is known of it into members; CLIP_benchmark's have either a label or captions."""
    of_picture = {name: value for name, value in picture._asdict().items() if name not in ("data", "extension")}
    extra = {"url": item.name, **item.extra, "file_name": item.name, "error_message": None, **of_picture}
    members, about = members_of(key, picture.data, picture.extension, item.captions, extra, item.label)
    if job.layout == "benchmark" and item.label is not None:
        del members["txt"]
    return members, about


def prepared(
    items: list[SourceItem], encoding: Encoding, num_threads: int
) -> Iterator[tuple[SourceItem, Picture | str]]:
    """Yield every item with its picture, or with the reason why it can't be used; in order, a chunk in memory."""
    if num_threads == 1:
        yield from ((item, prepare(item, encoding)) for item in items)
        return
    with ThreadPoolExecutor(num_threads) as threads:  # Pillow decodes without Python's lock
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            yield from zip(chunk, threads.map(lambda item: prepare(item, encoding), chunk), strict=True)


def prepare(item: SourceItem, encoding: Encoding) -> Picture | str:
    """Read and encode one picture, or say why not."""
    try:
        data = item.read() if item.read is not None else None
        if (size := item.path.stat().st_size if data is None else len(data)) > MAX_FILE_BYTES:
            return f"file of {size:,} bytes is over the limit of {MAX_FILE_BYTES:,}"
        return for_shard(item.path.read_bytes() if data is None else data, encoding)
    except OSError as error:
        return f"can't be read: {error.strerror or error}"
    except ValueError as error:
        return str(error)


def write_finished(job: Job, sha256: dict[str, str], skipped: list[dict[str, str]]) -> None:
    """Note that the shard is done, after all its files have their names."""
    partial = f"{job.finished}.{os.getpid()}.part"
    write_synced(partial, json.dumps({"sha256": sha256, "skipped": skipped}, ensure_ascii=False))
    os.replace(partial, job.finished)


def read_finished(job: Job) -> Done | None:
    """Return what an earlier process wrote, if every byte of it is still there."""
    try:
        note = json.loads(Path(job.finished).read_text("utf-8"))
        for name, sha256 in note["sha256"].items():
            with open(Path(job.folder) / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return None
        return Done(index_tar(Path(job.folder) / f"{job.name}.tar"), note["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
