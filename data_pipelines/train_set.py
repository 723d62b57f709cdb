"""Open what a run trains on: one source of shards, or several with weights."""

from softmoe_clip.data_pipelines.config import DataConfig
from softmoe_clip.data_pipelines.tar_index import ShardSet


def open_train(data: DataConfig) -> ShardSet:
    """Open the shards of `data.train`; raises ValueError where a source has none."""
    sets = [ShardSet.open(source.shards) for source in data.sources]
    return sets[0] if len(sets) == 1 else ShardSet.joined(sets, [source.weight for source in data.sources])


def in_words(data: DataConfig) -> str:
    """Name the shards of `data.train`."""
    patterns = [source.shards for source in data.sources]
    return ", ".join(pattern if isinstance(pattern, str) else ", ".join(pattern) for pattern in patterns)
