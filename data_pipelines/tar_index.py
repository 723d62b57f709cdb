"""Read any sample of a set of tars on its own, through an index of byte offsets kept beside them."""

import hashlib
import json
import os
import sys
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.index_file import INDEX_NAME, load_index, save_index
from softmoe_clip.data_pipelines.mixture import Source
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.remote_index import remote_part, remote_parts
from softmoe_clip.data_pipelines.shard_cache import ShardCache, cache_folder, release
from softmoe_clip.data_pipelines.shards import find_shards, is_remote
from softmoe_clip.data_pipelines.tar_walk import BLOCK, TarPart, index_tar

MAX_OPEN_SHARDS = 256  # per process, well below the usual limit of 1,024 open files
MAX_OPEN_COPIES = 1  # an open copy of a remote shard holds its place in the cache; a batch reads shard after shard


class RawSample(NamedTuple):
    """The bytes of one key; members maps a lower-case extension without its dot ("jpg", "txt") to them."""

    key: str
    shard: str
    members: dict[str, bytes]


class ShardSet:
    """All samples of a list of shards, by one global number in shard order. It can be pickled and forked.

    Of a remote shard that a count is known of, the part of the index (None until then) is made when it is first read.
    """

    def __init__(
        self,
        urls: Sequence[str],
        parts: Sequence[TarPart | None],
        counts: Sequence[int] = (),
        sources: Sequence[Source] = (),
        cache: ShardCache | None = None,
    ):
        self.urls = list(urls)
        self.known_parts = list(parts)
        self.counts = list(counts) or [len(part.keys) for part in parts]
        self.sources = list(sources) or [Source(len(self.urls))]
        self.cache = cache
        self._first = np.cumsum([0, *self.counts]).tolist()
        self._open = lru_cache(maxsize=MAX_OPEN_SHARDS)(_Descriptor)
        self._open_copy = lru_cache(maxsize=MAX_OPEN_COPIES)(lambda url: _Copy(self.cache, url))
        self._make_part = lru_cache(maxsize=MAX_OPEN_SHARDS)(lambda url: remote_part(url, self.cache))

    @classmethod
    def open(cls, pattern: str | Sequence[str], cache: ShardCache | None = None) -> "ShardSet":
        """Open the shards of a pattern (see `find_shards`), building and storing what their index lacks.

        A damaged tar gives the samples before the damage, a line in `problems` and one on stderr. Raises ValueError
        where there are no samples at all, or a file is no tar. Remote shards are copied into `cache`, by default this
        user's.
        """
        found = find_shards(pattern)
        cache = cache or ShardCache()
        local = [Path(shard.url) for shard in found if not is_remote(shard.url)]
        parts = dict(zip(map(str, local), _current_parts(local), strict=True))
        parts |= remote_parts([shard for shard in found if is_remote(shard.url)], cache)
        known = [parts[shard.url] for shard in found]
        counts = [len(part.keys) if part else shard.num_samples for part, shard in zip(known, found, strict=True)]
        shard_set = cls([shard.url for shard in found], known, counts, cache=cache)
        if not len(shard_set):
            reason = f" ({shard_set.problems[0]})" if shard_set.problems else ""
            raise ValueError(f"the shards of {pattern} hold no samples{reason}: make shards with `softmoe-clip pack`")
        tell_of_damage(shard_set.problems, len(found))
        return shard_set

    @classmethod
    def joined(cls, sets: Sequence["ShardSet"], weights: Sequence[float]) -> "ShardSet":
        """Put several sets one after the other, as sources that training draws from by weight."""
        return cls(
            [url for shard_set in sets for url in shard_set.urls],
            [part for shard_set in sets for part in shard_set.known_parts],
            [count for shard_set in sets for count in shard_set.counts],
            [Source(len(shard_set.urls), weight) for shard_set, weight in zip(sets, weights, strict=True)],
            sets[0].cache,
        )

    def __len__(self) -> int:
        return self._first[-1]

    def num_bytes(self, shard: int) -> int:
        """Return the size of a local shard; 0 of a remote one."""
        return 0 if is_remote(self.urls[shard]) else self.known_parts[shard].num_bytes

    @property
    def parts(self) -> list[TarPart]:
        """The index of every shard; remote ones that were not read yet are fetched for it."""
        return [self._part(shard) for shard in range(len(self.urls))]

    @property
    def problems(self) -> list[str]:
        return [problem for part in self.known_parts if part for problem in part.problems]

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
        part, url, sample = self._part(shard), self.urls[shard], index - self._first[shard]
        if sample >= len(part.keys):  # a file of counts promised more
            return RawSample(f"sample {sample} (there are {len(part.keys)})", part.name, {})
        key, extensions = part.keys[sample], part.extensions
        descriptor = self._open_copy(url) if is_remote(url) else self._open(url)
        members = {}
        for member in range(part.starts[sample], part.starts[sample + 1]):
            header_and_data = descriptor.read(BLOCK + part.sizes[member], part.offsets[member] - BLOCK)
            if not _matches(header_and_data, part, member):
                stale = self.cache.place(url).parent if is_remote(url) else _beside(url)
                raise ValueError(f"{url} has changed since it was indexed: delete {stale} and start again")
            members[extensions[member]] = header_and_data[BLOCK:]
        return RawSample(key, part.name, members)

    def fingerprint(self) -> str:
        """Hash what the order of samples depends on: shard names and sizes, keys and offsets (sha256).

        Of remote shards without an index only names and counts, which is all that is known of them.
        """
        digest = hashlib.sha256()
        for url, count, part in zip(self.urls, self.counts, self.known_parts, strict=True):
            if part is None:
                digest.update(json.dumps([url.rpartition("/")[2], count]).encode())
                continue
            digest.update(json.dumps([part.name, part.num_bytes, list(part.keys), list(part.extensions)]).encode())
            digest.update(part.starts.tobytes() + part.offsets.tobytes() + part.sizes.tobytes())
        return digest.hexdigest()

    def _part(self, shard: int) -> TarPart:
        return self.known_parts[shard] or self._make_part(self.urls[shard])

    def __reduce__(self):
        # Open files stay in their process.
        return ShardSet, (self.urls, self.known_parts, self.counts, self.sources, self.cache)


class _Descriptor:
    """A file descriptor that closes itself once nobody reads through it; `pread` shares no position after a fork."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.number, size, offset)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


class _Copy(_Descriptor):
    """The same of a remote shard's copy, which stays in the cache as long as this is there."""

    def __init__(self, cache: ShardCache, url: str):
        self.number = cache.open(url)

    def __del__(self):
        if hasattr(self, "number"):
            release(self.number)


def tell_of_damage(problems: Sequence[str], num_shards: int) -> None:
    """Say once, and in one process of several, that shards hold more than can be read of them."""
    if problems and os.environ.get("RANK", "0") == "0":
        _say_once(f"{len(problems):,} of {num_shards:,} shards damaged, `softmoe-clip check` lists them: {problems[0]}")


@lru_cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _current_parts(paths: list[Path]) -> list[TarPart]:
    folders = dict.fromkeys(path.parent for path in paths)
    stored = {folder: _stored_parts(folder) for folder in folders}
    parts = {
        path: next((p for p in stored[path.parent].get(path.name, []) if _is_current(path, p)), None) for path in paths
    }
    missing = [path for path, part in parts.items() if part is None]
    if missing:
        with progress("indexing, once", total=len(missing), unit="shards") as advance:
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
    return cache_folder() / "index" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.npz"


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
