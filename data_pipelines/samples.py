"""From the raw bytes of one key to a pair, an encoded picture and its captions; or a BadSample that says why not."""

import json
from collections.abc import Iterator
from typing import NamedTuple

from softmoe_clip.data_pipelines.tar_index import RawSample, ShardSet

PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class Pair(NamedTuple):
    """A picture as it lies in the shard, and its captions; a class label where the sample has one."""

    key: str
    shard: str
    image: bytes
    captions: tuple[str, ...]
    label: int | None = None


class BadSample(Exception):
    """A sample that cannot be used: which one, and why. Loaders catch it; it never stops a run by itself."""

    def __init__(self, key: str, shard: str, reason: str):
        super().__init__(key, shard, reason)
        self.key, self.shard, self.reason = key, shard, reason

    def __str__(self) -> str:
        return f"{self.key} in {self.shard}: {self.reason}"


def read_pair(raw: RawSample) -> Pair:
    """Take picture, captions and label out of a sample's members; the picture is not decoded here.

    Captions are the lines of `txt`, else `captions` or `caption` of `json`. Raises BadSample when the picture is
    missing, or when there is neither a caption nor a label.
    """
    try:
        image = next((raw.members[e] for e in PICTURE_EXTENSIONS if e in raw.members), None)
        if image is None:
            raise ValueError(f"no picture (.{', .'.join(PICTURE_EXTENSIONS)}) among its members")
        label = label_of(raw.members)
        captions = captions_of(raw.members)
        if not captions and label is None:
            raise ValueError("no caption")
    except ValueError as error:
        raise BadSample(raw.key, raw.shard, str(error)) from None
    return Pair(raw.key, raw.shard, image, captions, label)


def all_captions(shards: ShardSet) -> Iterator[str]:
    """Yield every caption of every good sample, in shard order: what a tokenizer is trained on."""
    for index in range(len(shards)):
        try:
            yield from read_pair(shards.read(index)).captions
        except BadSample:
            continue


def captions_of(members: dict[str, bytes]) -> tuple[str, ...]:
    """Read the captions, without empty ones."""
    if "txt" in members:
        try:
            lines = members["txt"].decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError("its .txt is not UTF-8") from None
        if captions := without_empty(lines):
            return captions
    return captions_in_json(members["json"]) if "json" in members else ()


def captions_in_json(data: bytes) -> tuple[str, ...]:
    """Read `captions` (a list) or `caption` (one) of a .json member."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError("its .json is damaged") from None
    if not isinstance(fields, dict):
        return ()
    captions = fields.get("captions")
    return without_empty(captions if isinstance(captions, list) else [fields.get("caption")])


def without_empty(captions: list) -> tuple[str, ...]:
    """Strip white space, and drop what is empty or no text."""
    return tuple(stripped for caption in captions if isinstance(caption, str) and (stripped := caption.strip()))


def label_of(members: dict[str, bytes]) -> int | None:
    """Read the class number of a .cls member (CLIP_benchmark's layout)."""
    if "cls" not in members:
        return None
    try:
        return int(members["cls"])
    except ValueError:
        raise ValueError("its .cls is not a whole number") from None
