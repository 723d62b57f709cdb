import io
import json
import os
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from tars import write_tar

from softmoe_clip.data_pipelines.check import check
from softmoe_clip.data_pipelines.loader import eval_batches, train_batches
from softmoe_clip.data_pipelines.pack import pack
from softmoe_clip.data_pipelines.pictures import RandomCrop
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.transforms import Augment

DATA = Path(os.environ.get("SOFTMOE_CLIP_DATA") or "absent")
ODD = DATA / "odd_images"
pytestmark = pytest.mark.skipif(not ODD.is_dir(), reason="needs SOFTMOE_CLIP_DATA with odd_images")
MAX_SECONDS = 60  # a hang, not a benchmark: about 2 seconds on two cores


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    files = json.loads((ODD / "manifest.json").read_text("utf-8"))["files"]
    rows = [{"image": str(ODD / file["file"]), "caption": f"{file['category']}: {file['what']}"} for file in files]
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    start = time.monotonic()
    report = pack(folder / "captions.jsonl", folder / "out", split="train", shard_size=100)
    assert time.monotonic() - start < MAX_SECONDS
    decodes = {str(ODD / file["file"]): file["pillow"]["decodes"] for file in files}
    return report, decodes, folder / "out"


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A shard with the files as they are, good and bad; a sample's key is its number in the manifest."""
    folder = tmp_path_factory.mktemp("raw")
    files = json.loads((ODD / "manifest.json").read_text("utf-8"))["files"]
    members = []
    for number, file in enumerate(files):
        members.append((f"{number:05d}.jpg", (ODD / file["file"]).read_bytes()))
        members.append((f"{number:05d}.txt", file["what"].encode()))
    write_tar(folder / "0.tar", members)
    return folder


def samples(out):
    shards = ShardSet.open(str(out))
    for index in range(len(shards)):
        members = shards.read(index).members
        yield json.loads(members["json"]), next(members[name] for name in ("jpg", "png", "webp") if name in members)


def test_every_odd_picture_is_packed_or_listed_with_a_reason(packed):
    report, decodes, _ = packed
    assert report.counts["train"] + len(report.skipped) == len(decodes)
    assert all(entry["reason"] for entry in report.skipped)
    skipped = {entry["name"]: entry["reason"] for entry in report.skipped}
    if json.loads((ODD / "manifest.json").read_text("utf-8"))["pillow_version"] == Image.__version__:
        # a good picture may only be left out for its size; no bad one may be let in
        assert all("over the limit" in skipped[name] for name in skipped if decodes[name])
        assert [name for name in decodes if not decodes[name] and name not in skipped] == []


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO", "ignore:Corrupt EXIF data")
def test_every_packed_picture_decodes_with_plain_pillow_as_its_json_says(packed):
    for about, data in samples(packed[2]):
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.mode in ("RGB", "L"), about
            assert picture.getexif().get(0x0112, 1) not in range(2, 9), about
            assert picture.convert("RGB").size == (about["width"], about["height"]), about


def test_each_orientation_is_packed_upright(packed):
    pictures = {}
    for about, data in samples(packed[2]):
        if "exif-orientation" in about["file_name"]:
            kind = Path(about["file_name"]).name.split("_")[0]
            small = Image.open(io.BytesIO(data)).convert("L").resize((16, 16))
            pictures.setdefault(kind, []).append((about["width"] > about["height"], small.tobytes()))
    assert {kind: len(found) for kind, found in pictures.items()} == {"Landscape": 9, "Portrait": 9}
    for kind, found in pictures.items():
        assert all(is_wide == (kind == "Landscape") for is_wide, _ in found)
        first = found[1][1]
        differences = [sum(abs(a - b) for a, b in zip(first, other, strict=True)) / 256 for _, other in found]
        assert max(differences) < 8, differences


def test_check_finds_nothing_wrong_with_the_packed_ones(packed):
    report = check(str(packed[2]), jobs=1)
    assert report.num_errors == 0
    assert report.num_samples == packed[0].counts["train"]


def test_check_names_each_file_that_pack_leaves_out_and_no_other(packed, raw):
    skipped = {entry["name"]: entry["reason"] for entry in packed[0].skipped}
    report = check(str(raw), jobs=1)
    errors = {int(f["key"]): f["reason"] for f in report.findings if f["severity"] == "error"}
    assert {name: errors[number] for number, name in enumerate(packed[1]) if number in errors} == skipped
    bombs = {int(f["key"]) for f in report.findings if f["kind"] == "decompression bomb"}
    files = json.loads((ODD / "manifest.json").read_text("utf-8"))["files"]
    huge = {number for number, f in enumerate(files) if "claim" in f["file"] or "size_12000" in f["file"]}
    assert huge <= bombs <= set(errors)


def one_id_each(captions):
    """Stand in for a tokenizer."""
    return torch.zeros(len(captions), 1, dtype=torch.int64)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_loader_uses_or_replaces_every_file_and_the_counts_add_up(raw, capfd, num_workers):
    shards = ShardSet.open(str(raw))
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(
            train_batches(
                shards,
                one_id_each,
                picture=RandomCrop(32, Augment()),
                batch_size=len(shards) // 5,
                seed=0,
                num_batches=5,
                num_workers=num_workers,
            )
        )
    assert time.monotonic() - start < MAX_SECONDS
    assert capfd.readouterr() == ("", "")
    keys = {position: key for batch in batches for position, key in zip(batch.positions, batch.keys, strict=True)}
    own = {}  # the first entry of a position is its own sample; more are substitutes that were bad, too
    for entry in (entry for batch in batches for entry in batch.replaced):
        own.setdefault(entry.position, entry)
        assert entry.reason
        assert entry.substitute_key == keys[entry.position]
    used = [key for position, key in keys.items() if position not in own]
    replaced = [entry.key for entry in own.values()]
    assert len(used) + len(replaced) == len(keys) == len(shards)
    assert sorted(used + replaced) == sorted(shards.keys), "in one pass every sample comes once, good or bad"
    errors = {finding["key"] for finding in check(str(raw), jobs=1).findings if finding["severity"] == "error"}
    assert set(replaced) == errors
    assert sum(len(batch.images) for batch in batches) == len(shards)


def test_evaluation_uses_or_lists_every_file(raw):
    shards = ShardSet.open(str(raw))
    batches = list(eval_batches(shards, lambda picture: torch.zeros(3, 1, 1), batch_size=50))
    used = [key for batch in batches for key in batch.keys]
    listed = [bad.key for batch in batches for bad in batch.skipped]
    assert sorted(used + listed) == sorted(shards.keys)
    assert all(bad.reason for batch in batches for bad in batch.skipped)


@pytest.mark.parametrize("name", ["coco_mini", "emoji"])
def test_a_captions_json_set_is_packed_whole(tmp_path, name):
    entries = json.loads((DATA / name / "captions.json").read_text("utf-8"))["images"]
    report = pack(DATA / name, tmp_path / "out")
    assert report.skipped == []
    assert sum(report.counts.values()) == len(entries)
    assert report.counts.keys() == {entry["split"] for entry in entries}
    captions = {entry["file_name"]: entry["captions"] for entry in entries}
    for split in report.counts:
        for about, _ in samples(tmp_path / "out" / split):
            assert about["captions"] == [" ".join(text.split()) for text in captions[about["file_name"]]]
