"""Read shards once, from their first byte to their last, in several processes, and keep what a check must know."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from multiprocessing import connection, get_context, parent_process
from typing import Any, NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.images import TooLarge, decode_rgb
from softmoe_clip.data_pipelines.picture_hash import COLOUR_BYTES, HASH_BYTES, MIN_SIDE, Look, look_of
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.samples import BadSample, read_pair
from softmoe_clip.data_pipelines.tar_index import RawSample
from softmoe_clip.data_pipelines.tar_walk import TarPart, index_tar

DIGEST_BYTES = 16
CHUNK = 128  # samples given to a process at a time
AHEAD = 4  # chunks that wait for each process
FEW = 512  # samples for which starting processes takes longer than reading


class Trouble(NamedTuple):
    """A sample that can't be used: its number, the kind of finding, and why."""

    sample: int
    kind: str
    reason: str


class Facts(NamedTuple):
    """What is kept of n samples: about 130 bytes each, and 24 for each caption."""

    keys: list[str]
    shards: np.ndarray  # (n,) the number of each sample's shard
    digests: np.ndarray  # (n, 16) of the picture's bytes; zeros without a picture
    look: Look
    captions: np.ndarray  # (c,) a digest of each caption
    pairs: np.ndarray  # (c,) a digest of each caption with its key
    owners: np.ndarray  # (c,) the sample of each caption
    troubles: list[Trouble]


def index_shards(urls: list[str], num_workers: int) -> list[TarPart | str]:
    """Index every tar by its headers; a text says why one can't be read at all."""
    if remote := next((url for url in urls if "://" in url), None):
        raise ValueError(f"{remote} is not on this machine: copy the shards to a local folder first")
    with progress("finding samples", len(urls), "shards") as advance:
        parts = []
        for part in in_order(index_or_reason, urls, num_workers if len(urls) > FEW else 1):
            parts.append(part)
            advance()
    return parts


def index_or_reason(url: str) -> TarPart | str:
    """Index one tar, or say why not."""
    try:
        return index_tar(url)
    except ValueError as error:
        return str(error).removeprefix(f"{url} ")
    except OSError as error:
        return f"can't be read: {error.strerror or error}"


def read_facts(urls: list[str], parts: list[TarPart], num_workers: int, description: str = "checking") -> Facts:
    """Read and decode every sample; the result is the same for any number of processes."""
    num_samples = sum(len(part.keys) for part in parts)
    tasks = (
        (url, shard_slice(part, first, first + CHUNK), shard)
        for shard, (url, part) in enumerate(zip(urls, parts, strict=True))
        for first in range(0, len(part.keys), CHUNK)
    )
    chunks = [no_facts()]
    with progress(description, num_samples, "samples") as advance:
        for chunk in in_order(read_chunk, tasks, num_workers if num_samples > FEW else 1):
            chunks.append(chunk)
            advance(len(chunk.keys))
    return joined(chunks)


def in_order(function: Callable[[Any], Any], tasks: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """Yield function(task) for each task in order, from processes that end with this one; 1 computes here."""
    if num_workers == 1:
        yield from map(function, tasks)
        return
    # Spawned, since a fork copies the held locks of other threads.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=end_with_parent)
    waiting: deque = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that read shards was killed: this is most often too little memory; try --jobs 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it is gone, even killed: a pool's processes would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shard_slice(part: TarPart, first: int, last: int) -> TarPart:
    """Cut the samples first to last (exclusive) out of a tar's index."""
    last = min(last, len(part.keys))
    starts = np.asarray(part.starts[first : last + 1])
    members = slice(int(starts[0]), int(starts[-1]))
    return TarPart(
        part.name,
        part.num_bytes,
        part.keys[first:last],
        part.extensions[members],
        starts - starts[0],
        part.offsets[members],
        part.sizes[members],
        part.header_crcs[members],
        problems=[],
    )


def raw_samples(url: str, part: TarPart) -> Iterator[RawSample]:
    """Read samples one after the other, as they lie in the tar."""
    with open(url, "rb", buffering=0) as file:
        for sample, key in enumerate(part.keys):
            members = {}
            for member in range(part.starts[sample], part.starts[sample + 1]):
                data = os.pread(file.fileno(), int(part.sizes[member]), int(part.offsets[member]))
                if len(data) < part.sizes[member]:
                    raise ValueError(f"{url} became shorter while it was read: start again")
                members[part.extensions[member]] = data
            yield RawSample(key, part.name, members)


def read_chunk(task: tuple[str, TarPart, int]) -> Facts:
    """Gather the facts of one chunk of a shard, numbered from 0."""
    url, part, shard = task
    facts = no_facts(part.keys, shard)
    captions, pairs, owners = [], [], []
    for sample, raw in enumerate(raw_samples(url, part)):
        try:
            pair = read_pair(raw)
        except BadSample as bad:
            kind = "no picture" if bad.reason.startswith("no picture") else "bad caption"
            facts.troubles.append(Trouble(sample, kind, bad.reason))
            continue
        facts.digests[sample] = np.frombuffer(blake2b(pair.image, digest_size=DIGEST_BYTES).digest(), np.uint8)
        for caption in dict.fromkeys(map(plain, pair.captions)):
            captions.append(digest(caption))
            pairs.append(digest(f"{raw.key}\0{caption}"))
            owners.append(sample)
        try:
            shapes, colours = look_of(decode_rgb(pair.image, MIN_SIDE))
        except ValueError as error:
            kind = "decompression bomb" if isinstance(error, TooLarge) else "bad picture"
            facts.troubles.append(Trouble(sample, kind, str(error)))
            continue
        facts.look.colours[sample] = np.frombuffer(colours, np.uint8)
        if shapes:
            facts.look.shapes[sample] = np.frombuffer(shapes, np.uint8)
            facts.look.has_shapes[sample] = True
    return facts._replace(
        captions=np.array(captions, np.uint64), pairs=np.array(pairs, np.uint64), owners=np.array(owners, np.int64)
    )


def plain(caption: str) -> str:
    """Write a caption as it is compared: without regard to case and white space."""
    return " ".join(caption.split()).casefold()


def digest(text: str) -> int:
    """Hash a text to 64 bits."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def no_facts(keys: list[str] | None = None, shard: int = 0) -> Facts:
    """Make room for the facts of samples of one shard."""
    n = len(keys or ())
    look = Look(np.zeros((n, HASH_BYTES), np.uint8), np.zeros((n, COLOUR_BYTES), np.uint8), np.zeros(n, bool))
    empty = np.zeros(0, np.uint64)
    digests = np.zeros((n, DIGEST_BYTES), np.uint8)
    return Facts(list(keys or ()), np.full(n, shard, np.int32), digests, look, empty, empty, np.zeros(0, np.int64), [])


def joined(chunks: list[Facts]) -> Facts:
    """Put chunks together; samples are numbered through."""
    firsts = np.cumsum([0, *(len(chunk.keys) for chunk in chunks)]).tolist()
    placed = list(zip(firsts, chunks, strict=False))
    return Facts(
        [key for chunk in chunks for key in chunk.keys],
        np.concatenate([chunk.shards for chunk in chunks]),
        np.concatenate([chunk.digests for chunk in chunks]),
        Look(*(np.concatenate(arrays) for arrays in zip(*(chunk.look for chunk in chunks), strict=True))),
        np.concatenate([chunk.captions for chunk in chunks]),
        np.concatenate([chunk.pairs for chunk in chunks]),
        np.concatenate([first + chunk.owners for first, chunk in placed]),
        [trouble._replace(sample=first + trouble.sample) for first, chunk in placed for trouble in chunk.troubles],
    )
