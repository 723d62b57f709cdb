"""Open what a run trains on: one source of shards or several with weights, here or remote."""

from softmoe_clip.data_pipelines.config import DataConfig
from softmoe_clip.data_pipelines.fetch import size_of
from softmoe_clip.data_pipelines.shard_cache import ShardCache
from softmoe_clip.data_pipelines.shards import is_remote
from softmoe_clip.data_pipelines.tar_index import ShardSet


def open_train(data: DataConfig) -> ShardSet:
    """Open the shards of `data.train`; raises ValueError where a source has none, or the cache cannot hold windows."""
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


def in_words(data: DataConfig) -> str:
    """Name the shards of `data.train`."""
    patterns = [source.shards for source in data.sources]
    return ", ".join(pattern if isinstance(pattern, str) else ", ".join(pattern) for pattern in patterns)
