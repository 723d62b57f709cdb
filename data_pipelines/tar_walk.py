"""Find where each sample's bytes lie in a tar, by reading its headers only."""

import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

BLOCK = 512
RECORD = 20 * BLOCK  # tars are padded with zeros to a multiple of this
# The first that a sample has is taken.
PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm")
CAPTION_EXTENSIONS = ("txt", "text", "caption", "captions", "cap")
TEXT_EXTENSIONS = (*CAPTION_EXTENSIONS, "json", "cls")
FILES = b"0\x007"
SKIPPED = b"123456"  # links, devices, folders: no bytes of their own


class Damage(Exception):
    """The tar can't be followed any further; its text says where and why."""


class PlainWalkEnds(Exception):
    """A header needs `tarfile` (long names, sizes above 8 GB, sparse files)."""


class Member(NamedTuple):
    name: str
    offset: int  # of the data; its header lies in the 512 bytes before
    size: int
    header_crc: int  # a changed tar is told by it when the sample is read


@dataclass(frozen=True)
class TarPart:
    """The index of one tar: sample i owns the members starts[i]:starts[i + 1]."""

    name: str
    num_bytes: int
    keys: Sequence[str]
    extensions: Sequence[str]  # each member's own
    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    header_crcs: np.ndarray
    problems: list[str]


def index_tar(path: str | Path) -> TarPart:
    """Index a tar; of a damaged one the whole members before the damage, with the damage in `problems`.

    Raises ValueError for a file that is no tar at all.
    """
    path = Path(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        num_bytes = os.fstat(descriptor).st_size
        members, problems = _members(descriptor, path, num_bytes)
    finally:
        os.close(descriptor)
    return _group(path.name, num_bytes, members, problems)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name as webdataset does: the key is all before the first dot of the base name, with folders."""
    match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", name.removeprefix("./"), re.DOTALL)
    if match is None or (name.startswith("__") and name.endswith("__")):
        return None
    return match[1], match[2].lower()


def _members(descriptor: int, path: Path, num_bytes: int) -> tuple[list[Member], list[str]]:
    _refuse_other_files(os.pread(descriptor, BLOCK, 0), path)
    for walk in (_walk(descriptor, num_bytes), _walk_with_tarfile(descriptor, path, num_bytes)):
        members: list[Member] = []
        problems: list[str] = []
        try:
            for member in walk:
                members.append(member)  # one by one, to keep what came before an error
        except PlainWalkEnds:
            continue
        except Damage as damage:
            problems.append(f"{path.name}: {damage}; what comes after is lost")
        return members, problems
    raise AssertionError("tarfile's walk never gives up")


def _refuse_other_files(first: bytes, path: Path) -> None:
    if not first:
        raise ValueError(f"{path} is empty: it should be a tar with samples")
    if first.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise ValueError(f"{path} is compressed: unpack it to a plain .tar, which can be read at random")
    if first.strip(b"\0") and not _checksum_holds(first):
        raise ValueError(f"{path} is not a tar: make shards with `softmoe-clip pack`")


def _walk(descriptor: int, num_bytes: int) -> Iterator[Member]:
    """Follow plain headers, the only ones most shards have; 10 times faster than `tarfile`."""
    offset = 0
    while True:
        header = os.pread(descriptor, BLOCK, offset)
        if _is_end(descriptor, header, offset):
            return
        kind, size = header[156], _size(header, offset)
        end = offset + BLOCK + -(-size // BLOCK) * BLOCK
        if kind in FILES and not header[:100].rstrip(b"\0").endswith(b"/"):
            if offset + BLOCK + size > num_bytes:
                raise Damage(f"cut off inside {_name(header)!r}")
            yield Member(_name(header), offset + BLOCK, size, zlib.crc32(header))
        elif kind == ord("x"):
            # webdataset's own writer puts one before every member, for fractions of a second only
            records = os.pread(descriptor, min(size, RECORD), offset + BLOCK)
            if size > RECORD or re.search(rb" (path|size|hdrcharset|GNU\.sparse[^=]*)=", records):
                raise PlainWalkEnds
        elif kind not in SKIPPED and kind not in FILES:
            raise PlainWalkEnds
        offset = end if kind not in SKIPPED else offset + BLOCK


def _walk_with_tarfile(descriptor: int, path: Path, num_bytes: int) -> Iterator[Member]:
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115
        except Exception as error:  # a forged header makes tarfile fail in a dozen ways, MemoryError among them
            raise Damage(str(error) or type(error).__name__) from error
        last = -1
        while True:
            try:
                info = tar.next()
            except Exception as error:
                raise Damage(f"damaged near byte {tar.offset} ({error or type(error).__name__})") from error
            tar.members = []  # tarfile keeps every member otherwise
            if info is None:
                break
            if info.size < 0 or info.offset <= last:  # else tarfile goes round in circles
                raise Damage(f"damaged at byte {info.offset} (a member's size is negative)")
            last = info.offset
            if info.isreg() and not info.issparse():
                if info.offset_data + info.size > num_bytes:
                    raise Damage(f"cut off inside {info.name!r}")
                header = os.pread(descriptor, BLOCK, info.offset_data - BLOCK)
                yield Member(info.name, info.offset_data, info.size, zlib.crc32(header))
        _is_end(descriptor, os.pread(descriptor, BLOCK, tar.offset), tar.offset)


def _is_end(descriptor: int, header: bytes, offset: int) -> bool:
    """True at the block of zeros that ends a tar; raise Damage where a header should be and is not."""
    if len(header) < BLOCK:
        raise Damage(f"cut off at byte {offset}, without an end mark")
    if not header.strip(b"\0"):
        if os.pread(descriptor, 10 * RECORD, offset).strip(b"\0"):
            raise Damage(f"has an end mark at byte {offset}, before the end of the file (several tars put together?)")
        return True
    if not _checksum_holds(header):
        raise Damage(f"damaged at byte {offset} (a header's checksum is wrong)")
    return False


def _checksum_holds(header: bytes) -> bool:
    stored = _octal(header[148:156])
    return stored == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _size(header: bytes, offset: int) -> int:
    if header[124] & 0x80:
        raise PlainWalkEnds
    size = _octal(header[124:136])
    if size is None:
        raise Damage(f"damaged at byte {offset} (a member's size is no number)")
    return size


def _octal(field: bytes) -> int | None:
    digits = field.split(b"\0", 1)[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _name(header: bytes) -> str:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _group(name: str, num_bytes: int, members: list[Member], problems: list[str]) -> TarPart:
    """Gather members by key in the order of first appearance; a key's second .jpg (.txt, ...) begins a new sample."""
    newest: dict[str, dict[str, Member]] = {}
    samples: list[tuple[str, dict[str, Member]]] = []
    dotted = _keys_with_dots(members)
    for member in members:
        if (split := split_name(member.name)) is None:
            continue
        key, extension = _split_at(split, dotted) if dotted else split
        if key not in newest or extension in newest[key]:
            newest[key] = {}
            samples.append((key, newest[key]))
        newest[key][extension] = member
    owned = [member for _, parts in samples for member in parts.values()]
    return TarPart(
        name,
        num_bytes,
        keys=[key for key, _ in samples],
        extensions=[extension for _, parts in samples for extension in parts],
        starts=np.cumsum([0] + [len(parts) for _, parts in samples], dtype=np.int64),
        offsets=np.array([member.offset for member in owned], np.int64),
        sizes=np.array([member.size for member in owned], np.int64),
        header_crcs=np.array([member.header_crc for member in owned], np.uint32),
        problems=problems,
    )


def _keys_with_dots(members: list[Member]) -> set[tuple[str, str]]:
    """Find the keys that hold dots themselves, as in img.001.jpg, img.001.txt, where webdataset would see one `img`.

    Told from an extension of two parts (img.left.jpg, img.caption.txt) by having both a picture and a text.
    """
    kinds: dict[tuple[str, str], set[bool]] = {}
    for member in members:
        key, extension = split_name(member.name) or ("", "")
        head, _, last = extension.rpartition(".")
        if head and last in (*PICTURE_EXTENSIONS, *TEXT_EXTENSIONS):
            kinds.setdefault((key, head), set()).add(last in PICTURE_EXTENSIONS)
    return {key for key, found in kinds.items() if len(found) == 2}


def _split_at(split: tuple[str, str], dotted: set[tuple[str, str]]) -> tuple[str, str]:
    """Give the middle parts of a name to its key, if that is one of those with dots."""
    key, extension = split
    head, _, last = extension.rpartition(".")
    return (f"{key}.{head}", last) if (key, head) in dotted else split
