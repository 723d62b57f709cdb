"""Shards that other tools wrote: webdataset's TarWriter, GNU tar; with other extensions, nested names, uneven tars."""

import io
import json
import shutil
import subprocess

import pytest
import torch
from few_samples import Letters
from PIL import Image

from softmoe_clip.data_pipelines.loader import train_batches
from softmoe_clip.data_pipelines.pictures import RandomCrop
from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.transforms import Augment


def picture(number, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (20 + number, 20), (number, 99, 0)).save(file, kind)
    return file.getvalue()


def pairs(shards):
    return {pair.key: pair.captions for pair in map(read_pair, map(shards.read, range(len(shards))))}


def test_what_webdatasets_own_writer_makes_can_be_trained_on(tmp_path):
    import webdataset

    samples = [
        {"__key__": "a/b/000", "jpg": picture(0), "txt": "zero"},
        {"__key__": "a/b/001", "jpeg": picture(1), "json": {"caption": "one", "url": "x"}},
        {"__key__": "c.d/000", "photo.jpg": picture(2), "caption.txt": "two"},
        {"__key__": "日本/000", "png": picture(3, "PNG"), "text": "three"},
        {
            "__key__": "000",
            "webp": picture(4, "WEBP"),
            "json": {"captions": ["four", "4"]},
            "seg.png": picture(9, "PNG"),
        },
        {"__key__": "x" * 130, "gif": picture(5, "GIF"), "txt": "five"},
    ]
    for shard, part in enumerate((samples[:1], samples[1:])):  # uneven
        with webdataset.TarWriter(str(tmp_path / f"{shard}.tar")) as writer:
            for sample in part:
                writer.write(sample)
    shards = ShardSet.open(str(tmp_path))
    assert shards.counts == [1, 5]
    expected = [("zero",), ("one",), ("two",), ("three",), ("four", "4"), ("five",)]
    assert pairs(shards) == dict(zip([sample["__key__"] for sample in samples], expected, strict=True))
    options = {"picture": RandomCrop(8, Augment()), "batch_size": 6, "seed": 0, "num_batches": 2}
    for batch in train_batches(shards, Letters(), **options):
        assert batch.replaced == []
        assert batch.images.dtype == torch.uint8
        assert sorted(batch.keys) == sorted(shards.keys)


@pytest.mark.skipif(not shutil.which("tar"), reason="there is no tar on this machine")
@pytest.mark.parametrize("format", ["gnu", "pax", "ustar"])
def test_what_gnu_tar_makes_of_a_folder_can_be_trained_on(tmp_path, format):
    files = {
        "a/b/000.jpg": picture(0),
        "a/b/000.txt": b"zero",
        "a/c/000.JPG": picture(1),
        "a/c/000.TXT": b"one\nuno",
        "img.001.jpg": picture(2),  # keys with dots in them
        "img.001.txt": b"two",
        "img.002.jpg": picture(3),
        "img.002.json": json.dumps({"caption": "three"}).encode(),
        "p q/é.jpeg": picture(4),
        "p q/é.caption": b"four",
        "left.jpg": picture(5),  # beside them, webdataset's longer extensions stay what they are
        "left.mask.png": picture(6, "PNG"),
        "left.txt": b"five",
    }
    for name, content in files.items():
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).write_bytes(content)
    subprocess.run(["tar", f"--format={format}", "-cf", tmp_path / "0.tar", "-C", tmp_path / "f", "."], check=True)
    # The other order: all pictures first, then all texts.
    pictures = sorted((name for name in files if name.lower().endswith("g")), reverse=True)
    texts = sorted(set(files) - set(pictures))
    names = [*pictures, *texts]
    subprocess.run(["tar", f"--format={format}", "-cf", tmp_path / "1.tar", "-C", tmp_path / "f", *names], check=True)
    expected = {
        "a/b/000": ("zero",),
        "a/c/000": ("one", "uno"),
        "img.001": ("two",),
        "img.002": ("three",),
        "p q/é": ("four",),
        "left": ("five",),
    }
    for name in ("0.tar", "1.tar"):
        shards = ShardSet.open(str(tmp_path / name))
        assert shards.problems == []
        assert pairs(shards) == expected
        left = shards.read(shards.keys.index("left"))
        assert read_pair(left).image == files["left.jpg"]
