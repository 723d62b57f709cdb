"""Open what a run trains on: one source of shards or several with weights, here or remote."""

from typing import TYPE_CHECKING

from softmoe_clip.data_pipelines.config import DataConfig
from softmoe_clip.data_pipelines.fetch import size_of
from softmoe_clip.data_pipelines.shard_cache import ShardCache
from softmoe_clip.data_pipelines.shards import braces, is_remote
from softmoe_clip.data_pipelines.tar_index import ShardSet

if TYPE_CHECKING:
    from softmoe_clip.data_pipelines.stream import Stream


def open_train(data: DataConfig) -> "ShardSet | Stream":
    """Open the shards of `data.train`; raises ValueError where a source has none, or the cache cannot hold windows."""
    if any(pattern.startswith("pipe:") for source in data.sources for pattern in patterns_of(source.shards)):
        return open_stream(data)
    cache = cache_of(data)
    sets = [ShardSet.open(source.shards, cache) for source in data.sources]
    check_cache(sets, data)
    return sets[0] if len(sets) == 1 else ShardSet.joined(sets, [source.weight for source in data.sources])


def cache_of(data: DataConfig) -> ShardCache:
    """Return the cache for remote shards that a config asks for."""
    return ShardCache(data.cache, data.cache_gib)


def check_cache(sets: list[ShardSet], data: DataConfig) -> None:
    """Refuse a cache without room for two windows of each source: shards would be fetched again for every batch."""
    needed = 0
    for shards in sets:
        urls = [url for url in shards.urls if is_remote(url)]
        if urls:
            part = next((part for part in shards.known_parts if part), None)
            size = part.num_bytes if part else size_of(urls[0]) or 0  # the first stands for all
            needed += size * min(len(urls), 2 * (data.window or len(urls)))
    if needed > data.cache_gib * 2**30:
        raise ValueError(
            f"the windows that are read and fetched at a time need about {needed / 2**30:.2g} GiB, but data.cache_gib "
            f"is {data.cache_gib:g}: raise it, or lower data.window from {data.window or 'all shards'}"
        )


def open_stream(data: DataConfig) -> "Stream":
    """List the commands to stream from; raises ValueError for what needs to know the samples beforehand."""
    from softmoe_clip.data_pipelines.stream import Stream

    if len(data.sources) > 1:
        raise ValueError("data.train holds a pipe: command, which cannot be one of several sources: name it alone")
    if data.image_features is not None:
        raise ValueError("data.image_features belong to numbered samples: they cannot be used with a pipe: command")
    return Stream(tuple(url for pattern in patterns_of(data.sources[0].shards) for url in braces(pattern)))


def batches_of(shards: "ShardSet | Stream"):
    """Return the function that makes training batches of such data."""
    from softmoe_clip.data_pipelines.loader import train_batches

    if isinstance(shards, ShardSet):
        return train_batches
    from softmoe_clip.data_pipelines.stream import stream_batches

    return stream_batches


def statement(shards: "ShardSet | Stream") -> list[str]:
    """Say what somebody who trains on such data must know; nothing most often."""
    if isinstance(shards, ShardSet):
        return []
    from softmoe_clip.data_pipelines.stream import STATEMENT

    return [STATEMENT]


def patterns_of(shards: str | tuple[str, ...]) -> list[str]:
    """Split what a source names into single patterns."""
    return [part.strip() for part in shards.split("::")] if isinstance(shards, str) else list(shards)


def in_words(data: DataConfig) -> str:
    """Name the shards of `data.train`."""
    return ", ".join(pattern for source in data.sources for pattern in patterns_of(source.shards))
