"""What loader workers leave in memory, and how they end."""

import os

import pytest
from few_samples import Letters, picture

from softmoe_clip.data_pipelines.loader import Draws, EvalBatches, TrainBatches
from softmoe_clip.data_pipelines.mixture import Mixture
from softmoe_clip.data_pipelines.pictures import RandomCrop
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.transforms import Augment, eval_transform
from softmoe_clip.data_pipelines.workers import computed_in_order


class InShared:
    """Whether the pictures of a batch lie in shared memory before the batch is sent to another process."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number].images.is_shared()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_worker_stacks_pictures_in_shared_memory(tmp_path, num_workers):
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(8):
            writer.add(picture(number), "jpg", ["a caption"])
    shards = ShardSet.open(str(tmp_path / "shards"))
    order, crop = Mixture.of(0, shards.counts, shards.sources, 0), RandomCrop(16, Augment())
    draws = Draws(shards, order, crop, 0, "random", False)
    for items in (TrainBatches(draws, Letters(), 0, 4, 4, 2), EvalBatches(shards, eval_transform({"size": 16}), 4)):
        assert list(computed_in_order(InShared(items), num_workers)) == 2 * [num_workers == 1]


class Dies:
    """Items whose computation ends the worker."""

    def __len__(self):
        return 2

    def __getitem__(self, number):
        os._exit(3)


@pytest.mark.slow
def test_a_worker_that_dies_is_one_sentence():
    with pytest.raises(ValueError, match="a loader worker stopped") as caught:
        next(computed_in_order(Dies(), 1))
    assert "\n" not in str(caught.value)
