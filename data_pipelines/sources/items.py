"""What every kind of source is read into: a list of pictures with captions, and class names where it has classes."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NO_PICTURE = "captions without a picture: the file is not there"
PICTURES = frozenset(
    f".{kind}"
    for kind in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm"),
        *("pbm", "pnm", "jp2", "j2k", "jpx", "avif", "ico", "cur", "icns", "tga", "psd", "dds", "pcx", "sgi", "qoi"),
        *("xbm", "xpm", "heic", "heif"),
    )
)
ROLES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SPLITS = frozenset(ROLES)

# From a class name to the captions of its pictures.
Prompts = Callable[[str], Sequence[str]]


class SourceItem(NamedTuple):
    """One picture of a source and its captions; `problem` says why it can't be used.

    `path` is the picture, or the file that holds it: then `read` returns its bytes, in any process.
    """

    name: str
    path: Path
    captions: tuple[str, ...]
    split: str | None
    extra: dict[str, Any]
    problem: str | None = None
    label: int | None = None
    read: Callable[[], bytes] | None = None


class Source(NamedTuple):
    """All pictures of a source; `classnames` in the order of the labels, empty where there are no classes."""

    items: list[SourceItem]
    classnames: tuple[str, ...] = ()


def plain_prompt(classname: str) -> list[str]:
    """Caption a picture by its class alone."""
    return [f"a photo of a {classname}"]


def share(name: str) -> float:
    """Map a name to a number from 0 to 1 that looks random and is always the same."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()[:8]) / 2**64


def mixed(items: Iterable[SourceItem]) -> list[SourceItem]:
    """Order pictures that come class by class by a hash: shards of one class each would make poor batches."""
    return sorted(items, key=lambda item: (share(item.name), item.name))


def with_roles(items: list[SourceItem]) -> list[SourceItem]:
    """Call the splits of a source train, val and test; without splits where it has none to train on or to hold out."""
    named = [item._replace(split=ROLES.get((item.split or "train").lower(), item.split)) for item in items]
    usable = {item.split for item in named if item.captions and item.problem is None}
    if "train" in usable and usable & {"val", "test"}:
        return named
    return [item._replace(split=None) for item in items]


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file in a fixed order, without hidden ones. Raises ValueError for a folder that can't be read.

    A linked folder is read like any other, unless it is met elsewhere already, or leads round in circles.
    """
    top = Path(folder).resolve()
    seen = {top}

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} can't be read ({error.strerror}): check its permissions") from error

    def is_new(path: Path) -> bool:
        if not path.is_symlink():
            return True
        real = path.resolve()
        if seen.intersection((real, *real.parents)) or real in top.parents:
            return False
        seen.add(real)
        return True

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folders[:] = [name for name in folders if is_new(Path(root, name))]
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def read_text(path: Path) -> str:
    """Read a file as UTF-8, with or without a byte order mark; line ends become newlines."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def clean(captions: Iterable[str]) -> tuple[str, ...]:
    """Turn runs of white space into one space; leave out empty captions."""
    return tuple(text for caption in captions if (text := " ".join(caption.split())))
