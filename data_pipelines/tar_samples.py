"""Read the samples of tars from their first byte to their last, in chunks that processes can share."""

import os
from collections.abc import Iterator

import numpy as np

from softmoe_clip.data_pipelines.processes import in_order
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.tar_index import RawSample
from softmoe_clip.data_pipelines.tar_walk import TarPart, index_tar

CHUNK = 128  # samples given to a process at a time
# What a single process has read before others have started.
FEW_SAMPLES = 512
FEW_SHARDS = 32


def index_shards(urls: list[str], num_processes: int) -> list[TarPart | str]:
    """Index every tar by its headers; a text says why one can't be read at all."""
    if remote := next((url for url in urls if "://" in url), None):
        raise ValueError(f"{remote} is not on this machine: copy the shards to a local folder first")
    with progress("finding samples", len(urls), "shards") as advance:
        parts = []
        for part in in_order(index_or_reason, urls, num_processes if len(urls) > FEW_SHARDS else 1):
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


def chunks_of(part: TarPart) -> Iterator[TarPart]:
    """Cut a tar's index into chunks."""
    return (shard_slice(part, first, first + CHUNK) for first in range(0, len(part.keys), CHUNK))


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
