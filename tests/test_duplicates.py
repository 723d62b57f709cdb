"""Duplicates: how the loader tells them, and what a run makes of them."""

import json

import pytest
import torch
from few_samples import Letters, batches, picture
from omegaconf import OmegaConf

from softmoe_clip.data_pipelines.samples import content_id
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.stream import Stream, stream_batches
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.training.duplicates import duplicates_of
from softmoe_clip.training.loop import train


def write(out, num_pictures, num_captions):
    """Write twelve samples with so many different pictures and captions."""
    with ShardWriter(out) as writer:
        for number in range(12):
            writer.add(picture(number % num_pictures), "jpg", [f"caption {number % num_captions}"])
    return str(out)


def no_pixels(data, sample, rng):
    """What stands for a picture where something was computed from it before."""
    return torch.zeros(3)


def test_the_ids_of_a_batch_are_those_of_captions_and_picture_files(tmp_path):
    shards = write(tmp_path / "shards", num_pictures=6, num_captions=4)
    expected = {number: (content_id(f"caption {number % 4}"), content_id(picture(number % 6))) for number in range(12)}
    options = {"picture": no_pixels, "batch_size": 4, "seed": 5, "num_batches": 3}
    found = batches(ShardSet.open(shards), **options, num_workers=1)
    found += stream_batches(Stream((f"pipe:cat {shards}/00000.tar",)), Letters(), **options)
    assert len(found) == 6
    for batch in found:
        assert batch.caption_ids.dtype == batch.picture_ids.dtype == torch.int64
        numbers = [int(key) % 12 for key in batch.keys]
        assert list(zip(batch.caption_ids.tolist(), batch.picture_ids.tolist(), strict=True)) == [
            expected[number] for number in numbers
        ]


def test_an_id_is_64_bits_of_the_content_without_white_space_around_a_caption():
    assert content_id(" a dog\n") == content_id("a dog") == content_id(b"a dog")
    assert content_id(b" a dog") != content_id(b"a dog")
    ids = [content_id(f"{number}") for number in range(2000)]
    assert len(set(ids)) == 2000
    assert min(ids) < -(2**62)
    assert max(ids) > 2**62
    assert content_id("half a pair: \ud800") != content_id("half a pair: ")


def test_nothing_is_looked_for_where_duplicates_are_negatives(tmp_path):
    (batch,) = batches(ShardSet.open(write(tmp_path / "shards", 3, 3)), num_batches=1)
    assert duplicates_of(batch, "negatives", torch.device("cpu")) is None
    found = duplicates_of(batch, "masked", torch.device("cpu"))
    assert found.count_as == "masked"
    assert torch.equal(found.alike(0, 8), batch.caption_ids[:, None] == batch.caption_ids)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def losses_of(tiny_config, tmp_path):
    """Train two steps with each way to count duplicates; return the losses of each run."""

    def make(shards, loss):
        return {
            count_as: losses(
                train(
                    tiny_config(
                        f"data.train={shards}",
                        f"loss={loss}",
                        f"duplicates={count_as}",
                        f"out={tmp_path / count_as}",
                        "steps=2",
                    )
                )
            )
            for count_as in ("negatives", "positives", "masked")
        }

    return make


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_run_on_pairs_that_repeat_has_another_loss_by_each_way(losses_of, tmp_path, loss):
    found = losses_of(write(tmp_path / "shards", num_pictures=3, num_captions=4), loss)
    assert all(len(set(values)) == 3 for values in zip(*found.values(), strict=True))
    assert (
        found["masked"][0] < found["negatives"][0]
    )  # the first step's weights are the same, and there are fewer terms


def test_positives_change_nothing_in_the_softmax_loss_where_captions_alone_repeat(losses_of, tmp_path):
    found = losses_of(write(tmp_path / "shards", num_pictures=12, num_captions=3), "clip")
    assert found["positives"] == pytest.approx(found["negatives"], rel=1e-5)
    assert found["masked"][0] < found["negatives"][0]


def test_a_run_on_pairs_that_never_repeat_has_the_same_loss_by_each_way(losses_of, tmp_path):
    found = losses_of(write(tmp_path / "shards", 12, 12), "clip")
    assert found["positives"] == pytest.approx(found["negatives"], rel=1e-6)
    assert found["masked"] == pytest.approx(found["negatives"], rel=1e-6)


def test_duplicates_may_not_change_at_a_resume_and_were_negatives_before_there_was_a_choice(tiny_config):
    run = train(tiny_config("steps=2", "optim.schedule=constant"))
    with pytest.raises(ValueError, match="duplicates: 'negatives' then, 'masked' now"):
        train(tiny_config("steps=3", "optim.schedule=constant", "duplicates=masked"))
    before = OmegaConf.load(run / "config.yaml")
    del before["duplicates"]
    OmegaConf.save(before, run / "config.yaml")
    train(tiny_config("steps=3", "optim.schedule=constant"))
    assert len(losses(run)) == 3


def test_an_unknown_way_to_count_duplicates_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"duplicates.*negatives.*positives.*masked"):
        tiny_config("duplicates=ignored")
