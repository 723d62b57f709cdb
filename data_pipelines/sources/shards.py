"""Shards as a source: what img2dataset, CLIP_benchmark or `pack` itself wrote, taken apart again."""

import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.samples import captions_of, json_fields, label_of, picture_extension, with_extension
from softmoe_clip.data_pipelines.shards import is_remote
from softmoe_clip.data_pipelines.sources.class_folders import folders_of, has_pictures
from softmoe_clip.data_pipelines.sources.items import (
    Prompts,
    Source,
    SourceItem,
    clean,
    plain_prompt,
    read_text,
)
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.tar_walk import TEXT_EXTENSIONS, TarPart

# What `pack` writes anew, and what describes the encoding before.
RESERVED = frozenset(
    (
        *("caption", "captions", "key", "status", "error_message", "shard_id"),
        *("width", "height", "original_width", "original_height", "exif", "sha256"),
    )
)


class PictureInTar(NamedTuple):
    """The bytes of one member."""

    tar: str
    offset: int
    size: int

    def __call__(self) -> bytes:
        with open(self.tar, "rb") as file:
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise ValueError(f"{self.tar} has changed while it was read")
        return data


def has_shards(folder: Path) -> bool:
    """True for a folder of tars, or of nothing but folders of them; false where pictures lie in it: they come first."""
    inside = folders_of(folder)
    if not (any(folder.glob("*.tar")) or (inside and all(any(path.glob("*.tar")) for path in inside))):
        return False
    return not has_pictures(folder)


def read_shards(source: str, prompts: Prompts = plain_prompt) -> Source:
    """List the samples of shards: a folder of tars, a folder of splits, or a pattern as in `find_shards`.

    Captions are those of the loader; a sample with a label alone is captioned by its class, if a classnames.txt is
    there. Raises ValueError for what is no tar, and for URLs.
    """
    if remote := next((part.strip() for part in source.split("::") if is_remote(part.strip())), None):
        raise ValueError(f"{remote} is not on this machine: copy the shards to a local folder first")
    folder = Path(source).expanduser()
    splits = {None: source}
    if folder.is_dir() and not any(folder.glob("*.tar")):
        splits = {tar.parent.name: str(tar.parent) for tar in sorted(folder.glob("*/*.tar"))}
    classnames = find_classnames(folder if folder.is_dir() else folder.parent)
    items = []
    for split, pattern in splits.items():
        shards = ShardSet.open(pattern)
        with progress("reading captions", len(shards), "samples") as advance:
            for url, part in zip(shards.urls, shards.parts, strict=True):
                with open(url, "rb") as tar:
                    for sample in range(len(part.keys)):
                        items.append(read_sample(url, tar, part, sample, split, classnames, prompts))
                        advance()
        for problem in shards.problems:
            items.append(SourceItem(problem.partition(":")[0], Path(pattern), (), split, {}, problem))
    return Source(items, tuple(classnames))


def read_sample(
    url: str, tar: BinaryIO, part: TarPart, sample: int, split: str | None, classnames: list[str], prompts: Prompts
) -> SourceItem:
    """Read what is text of a sample, and note where its picture lies."""
    members = {part.extensions[m]: m for m in range(part.starts[sample], part.starts[sample + 1])}
    texts = [(kind, members[kind]) for kind in dict.fromkeys(with_extension(members, TEXT_EXTENSIONS))]
    text = {kind: os.pread(tar.fileno(), int(part.sizes[m]), int(part.offsets[m])) for kind, m in texts}
    extra = {name: value for name, value in json_fields(text).items() if name not in RESERVED}
    captions, label, picture, problem = (), None, None, None
    try:
        picture = members[picture_extension(members)]
        captions, label = clean(captions_of(text)), label_of(text)
        if not captions and label is not None and 0 <= label < len(classnames):
            captions = clean(prompts(classnames[label]))
    except ValueError as error:
        problem = str(error)
    read = None
    if picture is not None:
        read = PictureInTar(url, int(part.offsets[picture]), int(part.sizes[picture]))
    name = str(extra.get("file_name") or part.keys[sample])
    return SourceItem(name, Path(url), captions, split, extra, problem, label, read)


def find_classnames(folder: Path) -> list[str]:
    """Read the classnames.txt of a folder or of the one above it, if there is one."""
    for place in (folder, folder.parent):
        if (place / "classnames.txt").is_file():
            return [line.strip() for line in read_text(place / "classnames.txt").rstrip().split("\n")]
    return []
