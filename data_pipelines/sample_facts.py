"""Read shards once and keep of each sample what a check must know."""

from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.images import TooLarge, decode_rgb
from softmoe_clip.data_pipelines.picture_hash import COLOUR_BYTES, HASH_BYTES, MIN_SIDE, Look, look_of
from softmoe_clip.data_pipelines.processes import in_order
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.samples import BadSample, read_pair
from softmoe_clip.data_pipelines.tar_samples import FEW_SAMPLES, chunks_of, raw_samples
from softmoe_clip.data_pipelines.tar_walk import TarPart

DIGEST_BYTES = 16


class Trouble(NamedTuple):
    """A sample that can't be used: its number, the kind of finding, and why."""

    sample: int
    kind: str
    reason: str


class Facts(NamedTuple):
    """What is kept of n samples: about 140 bytes each, and 24 for each caption."""

    keys: list[str]
    shards: np.ndarray  # (n,) the number of each sample's shard
    digests: np.ndarray  # (n, 16) of the picture's bytes; zeros without a picture
    look: Look
    labels: list[int | None]  # (n,) of .cls
    captions: np.ndarray  # (c,) a digest of each caption
    pairs: np.ndarray  # (c,) a digest of each caption with its key
    owners: np.ndarray  # (c,) the sample of each caption
    troubles: list[Trouble]


def read_facts(urls: list[str], parts: list[TarPart], num_processes: int, description: str = "checking") -> Facts:
    """Read and decode every sample; the result is the same for any number of processes."""
    num_samples = sum(len(part.keys) for part in parts)
    pairs = enumerate(zip(urls, parts, strict=True))
    tasks = ((url, chunk, shard) for shard, (url, part) in pairs for chunk in chunks_of(part))
    chunks = [no_facts()]
    with progress(description, num_samples, "samples") as advance:
        for chunk in in_order(read_chunk, tasks, num_processes if num_samples > FEW_SAMPLES else 1):
            chunks.append(chunk)
            advance(len(chunk.keys))
    return joined(chunks)


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
        facts.labels[sample] = pair.label
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
    shards, owners = np.full(n, shard, np.int32), np.zeros(0, np.int64)
    return Facts(list(keys or ()), shards, digests, look, [None] * n, empty, empty, owners, [])


def joined(chunks: list[Facts]) -> Facts:
    """Put chunks together; samples are numbered through."""
    firsts = np.cumsum([0, *(len(chunk.keys) for chunk in chunks)]).tolist()
    placed = list(zip(firsts, chunks, strict=False))
    return Facts(
        [key for chunk in chunks for key in chunk.keys],
        np.concatenate([chunk.shards for chunk in chunks]),
        np.concatenate([chunk.digests for chunk in chunks]),
        Look(*(np.concatenate(arrays) for arrays in zip(*(chunk.look for chunk in chunks), strict=True))),
        [label for chunk in chunks for label in chunk.labels],
        np.concatenate([chunk.captions for chunk in chunks]),
        np.concatenate([chunk.pairs for chunk in chunks]),
        np.concatenate([first + chunk.owners for first, chunk in placed]),
        [trouble._replace(sample=first + trouble.sample) for first, chunk in placed for trouble in chunk.troubles],
    )
