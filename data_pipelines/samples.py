"""From the raw bytes of one key to a pair, an encoded picture and its captions; or a BadSample that says why not."""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from softmoe_clip.data_pipelines.tar_index import RawSample, ShardSet
from softmoe_clip.data_pipelines.tar_walk import CAPTION_EXTENSIONS, PICTURE_EXTENSIONS

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


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

    Captions are the lines of `txt` (or `text`, `caption`, ...), else `captions`, `caption` or `text` of `json`. Raises
    BadSample when the picture is missing, or when there is neither a caption nor a label.
    """
    try:
        image = raw.members[picture_extension(raw.members)]
        label = label_of(raw.members)
        captions = captions_of(raw.members)
        if not captions and label is None:
            raise ValueError("no caption")
    except ValueError as error:
        raise BadSample(raw.key, raw.shard, str(error)) from None
    return Pair(raw.key, raw.shard, image, captions, label)


def content_id(content: bytes | str) -> int:
    """Return 64 bits of a hash, as a signed number; a text counts without the white space around it."""
    # JSON can hold half a surrogate pair, which is no UTF-8.
    data = content.strip().encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def all_captions(shards: ShardSet) -> Iterator[str]:
    """Yield every caption of every good sample, in shard order: what a tokenizer is trained on."""
    for index in range(len(shards)):
        try:
            yield from read_pair(shards.read(index)).captions
        except BadSample:
            continue


def picture_extension(members: Collection[str]) -> str:
    """Return the extension of the member that is the picture; raises ValueError where there is none."""
    if found := with_extension(members, PICTURE_EXTENSIONS):
        return found[0]
    there = f"only .{', .'.join(members)}" if members else "it has no members"
    raise ValueError(f"no picture (.{', .'.join(PICTURE_EXTENSIONS)}) among its members: {there}")


def with_extension(members: Collection[str], extensions: Sequence[str]) -> list[str]:
    """List the members of some kinds in the order of the kinds; a plain jpg comes before an image.jpg."""
    plain = [extension for extension in extensions if extension in members]
    longer = [name for extension in extensions for name in members if name.endswith(f".{extension}")]
    return plain + longer


def captions_of(members: dict[str, bytes]) -> tuple[str, ...]:
    """Read the captions, without empty ones: the first member that has any."""
    for name in with_extension(members, CAPTION_EXTENSIONS):
        try:
            lines = members[name].decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ValueError(f"its .{name} is not UTF-8") from None
        if captions := without_empty(lines):
            return captions
    for name in with_extension(members, ("json",)):
        if captions := captions_in_json(members[name], name):
            return captions
    return ()


def captions_in_json(data: bytes, name: str = "json") -> tuple[str, ...]:
    """Read a list of captions, or `captions` (a list), `caption` or `text` of a mapping."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"its .{name} is damaged") from None
    if isinstance(fields, list):
        return without_empty(fields)
    if not isinstance(fields, dict):
        return ()
    found = [fields.get(field) for field in ("captions", "caption", "text")]
    return next((c for value in found if (c := without_empty(value if isinstance(value, list) else [value]))), ())


def json_fields(members: dict[str, bytes]) -> dict[str, Any]:
    """Read the fields of the .json member; nothing of one that is damaged or holds no fields."""
    found = with_extension(members, ("json",))
    try:
        fields = json.loads(members[found[0]] if found else b"{}")
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def without_empty(captions: list) -> tuple[str, ...]:
    """Strip white space, and drop what is empty or no text."""
    return tuple(readable(text) for caption in captions if isinstance(caption, str) and (text := caption.strip()))


def readable(text: str) -> str:
    """Put a ? for each half of a surrogate pair, which JSON and file names may hold, and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def printable(text: str) -> str:
    """Put a ? for each control character: keys and captions come from anywhere, and may not steer a terminal."""
    return CONTROLS.sub("?", text)


def label_of(members: dict[str, bytes]) -> int | None:
    """Read the class number of a .cls member (CLIP_benchmark's layout)."""
    if "cls" not in members:
        return None
    try:
        return int(members["cls"])
    except ValueError:
        raise ValueError("its .cls is not a whole number") from None
