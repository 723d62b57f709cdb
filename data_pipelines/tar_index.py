"""Read any sample of a set of tars on its own, through an index of byte offsets kept beside them."""

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.mixture import Source
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.shards import find_shards
from softmoe_clip.data_pipelines.tar_walk import BLOCK, TarPart, index_tar

INDEX_NAME = "index.npz"
INDEX_VERSION = 1
MAX_OPEN_SHARDS = 256  # per process, well below the usual limit of 1,024 open files


class RawSample(NamedTuple):
    """The bytes of one key; members maps a lower-case extension without its dot ("jpg", "txt") to them."""

    key: str
    shard: str
    members: dict[str, bytes]


class ShardSet:
    """All samples of a list of shards, by one global number in shard order. It can be pickled and forked."""

    def __init__(self, urls: Sequence[str], parts: Sequence[TarPart], sources: Sequence[Source] = ()):
        self.urls = list(urls)
        self.parts = list(parts)
        self.sources = list(sources) or [Source(len(self.urls))]
        self.counts = [len(part.keys) for part in self.parts]
        self.problems = [problem for part in self.parts for problem in part.problems]
        self._first = np.cumsum([0, *self.counts]).tolist()
        self._open = lru_cache(maxsize=MAX_OPEN_SHARDS)(_Descriptor)

    @classmethod
    def open(cls, pattern: str | Sequence[str]) -> "ShardSet":
        """Open the shards of a pattern (see `find_shards`), building and storing what their index lacks.

        A damaged tar gives the samples before the damage, and a line in `problems`. Raises ValueError where there are
        no samples at all, or a file is no tar.
        """
        urls = [shard.url for shard in find_shards(pattern)]
        shard_set = cls(urls, _current_parts([Path(url) for url in urls]))
        if not len(shard_set):
            reason = f" ({shard_set.problems[0]})" if shard_set.problems else ""
            raise ValueError(f"the shards of {pattern} hold no samples{reason}: make shards with `softmoe-clip pack`")
        return shard_set

    @classmethod
    def joined(cls, sets: Sequence["ShardSet"], weights: Sequence[float]) -> "ShardSet":
        """Put several sets one after the other, as sources that training draws from by weight."""
        return cls(
            [url for shard_set in sets for url in shard_set.urls],
            [part for shard_set in sets for part in shard_set.parts],
            [Source(len(shard_set.urls), weight) for shard_set, weight in zip(sets, weights, strict=True)],
        )

    def __len__(self) -> int:
        return self._first[-1]

    @cached_property
    def keys(self) -> list[str]:
        return [key for part in self.parts for key in part.keys]

    def read(self, index: int) -> RawSample:
        """Read the sample with this global number.

        Raises IndexError beyond the end, ValueError where the tar has changed since it was indexed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = bisect_right(self._first, index) - 1
        part, url, sample = self.parts[shard], self.urls[shard], index - self._first[shard]
        descriptor = self._open(url)
        members = {}
        for member in range(part.starts[sample], part.starts[sample + 1]):
            header_and_data = descriptor.read(BLOCK + part.sizes[member], part.offsets[member] - BLOCK)
            if not _matches(header_and_data, part, member):
                raise ValueError(f"{url} has changed since it was indexed: delete {_beside(url)} and start again")
            members[part.extensions[member]] = header_and_data[BLOCK:]
        return RawSample(part.keys[sample], part.name, members)

    def fingerprint(self) -> str:
        """Hash what the order of samples depends on: shard names and sizes, keys and offsets (sha256)."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(json.dumps([part.name, part.num_bytes, part.keys, part.extensions]).encode())
            digest.update(part.starts.tobytes() + part.offsets.tobytes() + part.sizes.tobytes())
        return digest.hexdigest()

    def __reduce__(self):
        return ShardSet, (self.urls, self.parts, self.sources)  # open files stay in their process


class _Descriptor:
    """A file descriptor that closes itself once nobody reads through it; `pread` shares no position after a fork."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.number, size, offset)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


def save_index(path: str | Path, parts: Iterable[TarPart]) -> None:
    """Write the index of a folder's tars: plain arrays, no pickles; the file appears whole or not at all."""
    parts = list(parts)
    extensions = sorted({extension for part in parts for extension in part.extensions})
    ids = {extension: number for number, extension in enumerate(extensions)}
    text = {
        "version": INDEX_VERSION,
        "names": [part.name for part in parts],
        "keys": [part.keys for part in parts],
        "problems": [part.problems for part in parts],
        "extensions": extensions,
    }
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(
                file,
                text=np.frombuffer(json.dumps(text).encode("ascii"), np.uint8),
                num_bytes=np.array([part.num_bytes for part in parts], np.int64),
                num_members=np.array([len(part.offsets) for part in parts], np.int64),
                starts=_joined([part.starts for part in parts], np.int64),
                extensions=_joined([np.array([ids[e] for e in part.extensions], np.int32) for part in parts], np.int32),
                offsets=_joined([part.offsets for part in parts], np.int64),
                sizes=_joined([part.sizes for part in parts], np.int64),
                header_crcs=_joined([part.header_crcs for part in parts], np.uint32),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_index(path: str | Path) -> dict[str, TarPart]:
    """Read an index by tar name; a missing, damaged or foreign one is empty: it can always be made again."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {part.name: part for part in _parts({name: arrays[name] for name in arrays.files})}
    except Exception:  # zipfile and numpy have a dozen ways to fail on a damaged file
        return {}


def _parts(arrays: dict[str, np.ndarray]) -> list[TarPart]:
    text = json.loads(arrays["text"].tobytes())
    if text["version"] != INDEX_VERSION:
        return []
    num_samples = [len(keys) for keys in text["keys"]]
    lengths = {len(arrays[name]) for name in ("extensions", "offsets", "sizes", "header_crcs")}
    if lengths != {arrays["num_members"].sum()} or len(arrays["starts"]) != sum(num_samples) + len(num_samples):
        raise ValueError("the arrays do not fit together")
    starts = np.split(arrays["starts"], np.cumsum([count + 1 for count in num_samples])[:-1])
    ends = np.cumsum(arrays["num_members"])[:-1]
    columns = [np.split(arrays[name], ends) for name in ("extensions", "offsets", "sizes", "header_crcs")]
    return [
        TarPart(
            text["names"][p],
            int(arrays["num_bytes"][p]),
            text["keys"][p],
            [text["extensions"][number] for number in columns[0][p]],
            starts[p],
            *(column[p] for column in columns[1:]),
            problems=text["problems"][p],
        )
        for p in range(len(num_samples))
    ]


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _current_parts(paths: list[Path]) -> list[TarPart]:
    folders = dict.fromkeys(path.parent for path in paths)
    stored = {folder: _stored_parts(folder) for folder in folders}
    parts = {
        path: next((p for p in stored[path.parent].get(path.name, []) if _is_current(path, p)), None) for path in paths
    }
    missing = [path for path, part in parts.items() if part is None]
    if missing:
        with progress("indexing", total=len(missing), unit="shards") as advance:
            for path in missing:
                parts[path] = index_tar(path)
                advance()
        for folder in dict.fromkeys(path.parent for path in missing):
            _store(folder, {path.name: part for path, part in parts.items() if path.parent == folder})
    return [parts[path] for path in paths]


def _stored_parts(folder: Path) -> dict[str, list[TarPart]]:
    found: dict[str, list[TarPart]] = {}
    for index in (folder / INDEX_NAME, _cached(folder)):
        for name, part in load_index(index).items():
            found.setdefault(name, []).append(part)
    return found


def _store(folder: Path, parts: dict[str, TarPart]) -> None:
    """Keep the index beside the shards, or in the user's cache where that can't be written."""
    others = {name: stored[0] for name, stored in _stored_parts(folder).items() if (folder / name).exists()}
    ordered = [part for _, part in sorted({**others, **parts}.items())]
    try:
        save_index(folder / INDEX_NAME, ordered)
    except OSError:
        with suppress(OSError):  # no cache either: it lives in memory
            _cached(folder).parent.mkdir(parents=True, exist_ok=True)
            save_index(_cached(folder), ordered)


def _cached(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "softmoe-clip" / "index" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.npz"


def _beside(url: str) -> Path:
    beside = Path(url).parent / INDEX_NAME
    return beside if beside.exists() else _cached(Path(url).parent)


def _is_current(path: Path, part: TarPart) -> bool:
    """Compare size, first and last header; the others are compared when read. (A copy changes the file's time.)"""
    if path.stat().st_size != part.num_bytes:
        return False
    descriptor = _Descriptor(str(path))
    ends = [0, len(part.offsets) - 1] if len(part.offsets) else []
    return all(_matches(descriptor.read(BLOCK + part.sizes[m], part.offsets[m] - BLOCK), part, m) for m in ends)


def _matches(header_and_data: bytes, part: TarPart, member: int) -> bool:
    complete = len(header_and_data) == BLOCK + part.sizes[member]
    return complete and zlib.crc32(header_and_data[:BLOCK]) == part.header_crcs[member]
