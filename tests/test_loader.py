"""The loader: the same batches for any number of workers and ranks, any start, with substitutes for bad samples."""

import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from few_samples import Letters, assert_same, batches, picture
from PIL import Image

from softmoe_clip.data_pipelines.loader import Draws, TrainBatches, eval_batches, train_batches
from softmoe_clip.data_pipelines.mixture import Mixture
from softmoe_clip.data_pipelines.pictures import RandomCrop
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.transforms import Augment, eval_transform

CROP = RandomCrop(16, Augment())
DATA = os.environ.get("SOFTMOE_CLIP_DATA")


def bomb() -> bytes:
    """The header of a PNG of 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 100) + b"IDAT" + bytes(100)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """33 samples in four shards, four of them bad, one with a label but no caption."""
    out = tmp_path_factory.mktemp("loader") / "shards"
    with ShardWriter(out, shard_size=10) as writer:
        for number in range(33):
            kind, extension = (("JPEG", "jpg"), ("PNG", "png"))[number % 2]
            image, captions = picture(number, kind), [f"{number}a", f"{number}b", f"{number}c"]
            if number == 4:
                image = image[:-40]
            if number == 11:
                image = b"this is text, and no picture"
            if number == 17:
                captions = ["  "]
            if number == 30:
                image = bomb()
            writer.add(image, extension, captions if number != 20 else [], label=3 if number == 20 else None)
    return ShardSet.open(str(out))


def test_batches_hold_what_they_say(shards):
    for number, batch in enumerate(batches(shards)):
        assert batch.images.shape == (8, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.token_ids, Letters()(batch.captions))
        assert batch.positions == list(range(8 * number, 8 * number + 8))
        for key, caption in zip(batch.keys, batch.captions, strict=True):
            assert int(caption[:-1]) == int(key[:5]) * 10 + int(key[5:])


def test_workers_change_nothing(shards):
    alone = batches(shards)
    for num_workers in (1, 2):
        assert_same(alone, batches(shards, num_workers=num_workers))


def test_ranks_cut_the_same_global_batches(shards):
    alone = batches(shards)
    for world_size in (2, 4):
        parts = [batches(shards, rank=rank, world_size=world_size, num_workers=rank % 2) for rank in range(world_size)]
        for whole, *pieces in zip(alone, *parts, strict=True):
            assert torch.equal(whole.images, torch.cat([piece.images for piece in pieces]))
            for field in ("keys", "captions", "positions", "replaced"):
                assert getattr(whole, field) == [x for piece in pieces for x in getattr(piece, field)]


def test_a_start_in_the_middle_gives_the_tail(shards):
    whole = batches(shards)
    assert_same(whole[7:], batches(shards, start=56, num_batches=3, num_workers=1))
    shifted = batches(shards, start=3, batch_size=10, num_batches=2)
    keys = [key for batch in whole for key in batch.keys]
    assert [key for batch in shifted for key in batch.keys] == keys[3:23]


def test_seeds_draw_other_orders_crops_and_captions(shards):
    first, second = batches(shards), batches(shards, seed=6)
    assert [b.keys for b in first] != [b.keys for b in second]
    drawn = {caption[-1] for batch in first for caption in batch.captions}
    assert drawn == {"a", "b", "c"}
    assert {c[-1] for b in batches(shards, caption="first") for c in b.captions} == {"a"}


def test_each_pass_meets_each_good_sample_and_replaces_each_bad_one(shards):
    (one_pass,) = batches(shards, batch_size=33, num_batches=1)
    replaced = {entry.position: entry for entry in one_pass.replaced}
    assert {entry.key for entry in one_pass.replaced} == {f"{n // 10:05d}{n % 10:04d}" for n in (4, 11, 17, 20, 30)}
    good = [key for position, key in enumerate(one_pass.keys) if position not in replaced]
    assert len(set(good)) == len(good) == 28
    for entry in one_pass.replaced:
        assert entry.substitute_key == one_pass.keys[entry.position]
        assert entry.shard == f"{entry.key[:5]}.tar"
    reasons = {int(entry.key[:5]) * 10 + int(entry.key[5:]): entry.reason for entry in one_pass.replaced}
    assert "truncated" in reasons[4]
    assert reasons[11] == "no picture in a known format"
    assert reasons[17] == reasons[20] == "no caption"
    assert "pixels" in reasons[30]


def test_sources_are_drawn_by_weight_and_replaced_within_themselves(shards, tmp_path):
    with ShardWriter(tmp_path / "more") as writer:
        for number in range(7):
            writer.add(picture(number), "jpg", [] if number == 3 else ["more"])
    both = ShardSet.joined([shards, ShardSet.open(str(tmp_path / "more"))], [3.0, 1.0])
    found = batches(both, batch_size=100, num_batches=10)
    assert_same(found, batches(both, batch_size=100, num_batches=10, num_workers=2))
    captions = [caption for batch in found for caption in batch.captions]
    assert captions.count("more") == 250
    replaced = [entry for batch in found for entry in batch.replaced]
    assert {entry.key for entry in replaced} >= {"000000003", "000000004"}
    for entry in replaced:
        own = entry.key == "000000003"
        assert (captions[entry.position] == "more") == own


def test_shuffled_captions_belong_to_other_pictures(shards):
    shuffled = batches(shards, shuffle_captions=True)
    assert_same(shuffled, batches(shards, shuffle_captions=True, num_workers=2))
    for plain, control in zip(batches(shards), shuffled, strict=True):
        assert plain.keys == control.keys
        for key, caption in zip(control.keys, control.captions, strict=True):
            assert int(caption[:-1]) != int(key[:5]) * 10 + int(key[5:])


def test_global_generators_are_left_alone(shards):
    torch.manual_seed(0)
    states = torch.get_rng_state(), random.getstate()
    batches(shards, num_batches=1)
    batches(shards, num_batches=1, num_workers=1)
    list(eval_batches(shards, pixels_of, 8, num_workers=1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.resize((4, 4)).getpixel((1, 1))).view(3, 1, 1) / 255


def test_no_warning_leaks_even_with_threads_and_more_workers_than_cores(shards):
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches(shards, num_batches=2, num_workers=(os.cpu_count() or 1) + 1)
        assert not caught
    finally:
        done.set()
        thread.join()


def test_wrong_sizes_are_refused_before_anything_is_read(shards):
    with pytest.raises(ValueError, match="must divide by the 3 processes"):
        train_batches(shards, Letters(), picture=CROP, batch_size=8, seed=0, num_batches=1, world_size=3)
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        train_batches(shards, Letters(), picture=CROP, batch_size=8, seed=-1, num_batches=1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nearly_all_bad_is_one_sentence(tmp_path, num_workers):
    with ShardWriter(tmp_path / "bad") as writer:
        for _ in range(50):
            writer.add(b"text", "jpg", ["a caption"])
    shards = ShardSet.open(str(tmp_path / "bad"))
    with pytest.raises(ValueError, match=r"nearly all samples are bad.*softmoe-clip check") as caught:
        batches(shards, num_workers=num_workers)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"none of the 50 samples can be used: 000000000 in 00000\.tar") as caught:
        list(eval_batches(shards, pixels_of, 8, num_workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_meets_each_good_sample_once_in_order(shards, batch_size, num_workers):
    found = list(eval_batches(shards, pixels_of, batch_size, num_workers))
    assert all(len(batch.images) == len(batch.keys) == len(batch.labels) > 0 for batch in found)
    indices = [index for batch in found for index in batch.indices]
    assert indices == [index for index in range(33) if index not in (4, 11, 17, 30)]
    assert [key for batch in found for key in batch.keys] == [shards.keys[index] for index in indices]
    assert {bad.key for batch in found for bad in batch.skipped} == {shards.keys[n] for n in (4, 11, 17, 30)}
    captions = dict(zip(indices, (c for batch in found for c in batch.captions), strict=True))
    assert captions[8] == ("8a", "8b", "8c")
    assert captions[20] == ()
    labels = dict(zip(indices, (label for batch in found for label in batch.labels), strict=True))
    assert labels[20] == 3
    assert labels[8] is None


def test_everything_a_worker_needs_can_be_pickled(shards):
    draws = Draws(shards, Mixture.of(0, shards.counts, shards.sources, 0), CROP, 0, "random", False)
    items = TrainBatches(draws, Letters(), 0, 4, 4, 2)
    again = pickle.loads(pickle.dumps(items))
    assert torch.equal(again[1].images, items[1].images)
    pickle.dumps(eval_transform({"size": 16}))


ABANDON = """
import os, signal, sys, time
from softmoe_clip.data_pipelines.loader import train_batches
from softmoe_clip.data_pipelines.pictures import RandomCrop
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.transforms import Augment
sys.path.insert(0, {tests!r})
from few_samples import Letters
signal.signal(signal.SIGINT, lambda *_: None)
signal.signal(signal.SIGTERM, lambda *_: None)
batches = train_batches(ShardSet.open({shards!r}), Letters(), picture=RandomCrop(16, Augment()), batch_size=8, seed=0,
                        num_batches=10_000, num_workers=2)
next(batches)
print("ready", flush=True)
time.sleep(1)
for _ in range(50):
    next(batches)
print("still", time.time(), flush=True)
"""


@pytest.mark.slow
def test_signals_to_the_group_reach_only_the_parent_and_leaving_is_quick(shards):
    code = ABANDON.format(tests=str(Path(__file__).parent), shards=str(Path(shards.urls[0]).parent))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, start_new_session=True)
    assert child.stdout.readline() == "ready\n"
    os.killpg(child.pid, signal.SIGINT)
    os.killpg(child.pid, signal.SIGTERM)
    out, error = child.communicate(timeout=60)
    assert (child.returncode, error) == (0, "")
    assert out.startswith("still ")
    assert time.time() - float(out.split()[1]) < 3
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


@pytest.mark.skipif(not DATA, reason="SOFTMOE_CLIP_DATA names no folder of real pictures")
def test_odd_pictures_in_shards_never_stop_the_loader(tmp_path):
    files = sorted(file for file in (Path(DATA) / "odd_images").rglob("*") if file.is_file())
    with ShardWriter(tmp_path / "odd", shard_size=100) as writer:
        for file in files:
            writer.add(file.read_bytes(), "jpg", [file.name])
    shards = ShardSet.open(str(tmp_path / "odd"))
    (batch,) = batches(shards, batch_size=len(files), num_batches=1, image_size=64)
    assert batch.images.shape == (len(files), 3, 64, 64)
    positions = {entry.position for entry in batch.replaced}
    assert 0.2 < len(positions) / len(files) < 0.35
    assert all(entry.reason and "\n" not in entry.reason for entry in batch.replaced)
    skipped = [bad.key for found in eval_batches(shards, pixels_of, 64) for bad in found.skipped]
    assert set(skipped) == {entry.key for entry in batch.replaced}
