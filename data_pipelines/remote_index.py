"""What is known of remote shards before they are read: an index beside them, or counts, or else they are counted."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from softmoe_clip.data_pipelines.fetch import Missing
from softmoe_clip.data_pipelines.index_file import INDEX_NAME, load_index, save_index
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.shard_cache import ShardCache, release
from softmoe_clip.data_pipelines.shards import Shard
from softmoe_clip.data_pipelines.tar_walk import TarPart, index_tar

FETCHERS = 4


def remote_parts(shards: Sequence[Shard], cache: ShardCache) -> dict[str, TarPart | None]:
    """Return what is known of remote shards: their index, if it lies beside them; else None if their counts do.

    Of all others the samples must be counted, for which each is fetched once.
    """
    stored: dict[str, TarPart] = {}
    for folder in dict.fromkeys(shard.url.rpartition("/")[0] for shard in shards):
        with suppress(Missing):
            index = load_index(cache.fetch(f"{folder}/{INDEX_NAME}"))
            stored |= {f"{folder}/{name}": part for name, part in index.items()}
    parts = {shard.url: stored.get(shard.url) for shard in shards}
    missing = [shard.url for shard in shards if parts[shard.url] is None and shard.num_samples is None]
    if missing:
        what = "counting samples (no sizes.json or index.npz beside the shards, so each is fetched once)"
        with progress(what, total=len(missing), unit="shards") as advance, ThreadPoolExecutor(FETCHERS) as fetchers:
            for url, part in zip(missing, fetchers.map(lambda url: remote_part(url, cache), missing), strict=True):
                parts[url] = part
                advance()
    return parts


def remote_part(url: str, cache: ShardCache) -> TarPart:
    """Return the index of a remote shard, which stays in the cache when its copy has to go."""
    place = cache.place(url)
    stored = place.with_name(f"{place.name}.{INDEX_NAME}")
    if part := load_index(stored).get(place.name):
        return part
    descriptor = cache.open(url)
    try:
        part = index_tar(place)
    finally:
        release(descriptor)
    save_index(stored, [part])
    return part
