import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from softmoe_clip.data_pipelines import pack_shard
from softmoe_clip.data_pipelines.pack import pack
from softmoe_clip.data_pipelines.shard_files import ShardFiles
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet


def noise(size=(16, 12), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def make_source(folder, num_pictures=12, **captions):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_pictures):
        (folder / f"{number}.png").write_bytes(encoded(noise(seed=number)))
        (folder / f"{number}.txt").write_text(captions.get(f"c{number}", f"first {number}\nsecond {number}\n"), "utf-8")
    return folder


def names(shards):
    return [json.loads(shards.read(index).members["json"])["file_name"] for index in range(len(shards))]


def all_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_train_and_val_with_bytes_and_captions_kept(tmp_path):
    source = make_source(tmp_path / "source", 40)
    report = pack(source, tmp_path / "out", shard_size=10)
    train, val = (ShardSet.open(str(tmp_path / "out" / split)) for split in ("train", "val"))
    assert report.counts == {"train": len(train), "val": len(val)}
    assert 1 <= len(val) <= 10
    assert sorted(names(train) + names(val)) == sorted(f"{number}.png" for number in range(40))
    assert train.keys[:11] == [f"{number // 10:05d}{number % 10:04d}" for number in range(11)]
    sample = train.read(3)
    about = json.loads(sample.members["json"])
    assert sample.members["png"] == (source / about["file_name"]).read_bytes()
    number = about["file_name"].removesuffix(".png")
    assert sample.members["txt"].decode().split("\n") == [f"first {number}", f"second {number}"] == about["captions"]
    assert (about["caption"], about["key"], about["width"], about["height"], about["status"]) == (
        f"first {number}",
        sample.key,
        16,
        12,
        "success",
    )
    sizes = json.loads((tmp_path / "out" / "train" / "sizes.json").read_text())
    assert list(sizes.values()) == train.counts


# webdataset leaves its files open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_we_write(tmp_path):
    import webdataset

    pack(make_source(tmp_path / "source"), tmp_path / "out", split="train")
    ours = ShardSet.open(str(tmp_path / "out"))
    theirs = list(webdataset.WebDataset(str(tmp_path / "out" / "00000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == ours.keys
    for index, sample in enumerate(theirs):
        assert {name: data for name, data in sample.items() if not name.startswith("__")} == ours.read(index).members


def test_equal_sources_give_equal_bytes(tmp_path):
    source = make_source(tmp_path / "source")
    pack(source, tmp_path / "a")
    time.sleep(1.1)
    pack(source, tmp_path / "b")
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")


def test_a_picture_keeps_its_side_of_the_holdout_when_others_are_added(tmp_path):
    few, many = make_source(tmp_path / "few", 30), make_source(tmp_path / "many", 60)
    pack(few, tmp_path / "a", holdout=0.3)
    pack(many, tmp_path / "b", holdout=0.3)
    before, after = (set(names(ShardSet.open(str(tmp_path / out / "val")))) for out in "ab")
    assert before == {name for name in after if int(name[:-4]) < 30}
    assert 10 <= len(after) <= 26


def test_splits_of_the_source_are_kept_and_one_can_be_chosen(tmp_path):
    source = make_source(tmp_path / "source", 6)
    rows = [{"image": f"{n}.png", "caption": f"c {n}", "split": ("train", "val", "test")[n % 3]} for n in range(6)]
    table = source / "captions.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    assert pack(table, tmp_path / "all").counts == {"train": 2, "val": 2, "test": 2}
    assert pack(source, tmp_path / "test", split="test").counts == {"test": 2}
    assert names(ShardSet.open(str(tmp_path / "test"))) == ["2.png", "5.png"]
    with pytest.raises(ValueError, match=r"has no split 'tset': it has test, train, val"):
        pack(table, tmp_path / "no", split="tset")
    table.write_text("\n".join(json.dumps({**row, "split": "../x"}) for row in rows))
    with pytest.raises(ValueError, match=r"a split named '\.\./x'"):
        pack(table, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_can_not_be_used_is_listed_and_counts_add_up(tmp_path):
    source = make_source(tmp_path / "source", 12, c3=" \n\n", c4="x" * 10_000, c5="naïve 日本\nzwei")
    (source / "6.png").rename(source / "zoë 日本.png")
    (source / "6.txt").rename(source / "zoë 日本.txt")
    (source / "7.png").write_bytes((source / "7.png").read_bytes()[:200])
    (source / "8.png").write_text("no picture at all")
    (source / "8.png").rename(source / "8.jpg")
    (source / "9.txt").unlink()
    (source / "10.png").unlink()
    (source / "11.txt").write_bytes(b"\xff\xfe\xfa")
    report = pack(source, tmp_path / "out", split="train")
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert reasons.keys() == {"3.png", "7.png", "8.jpg", "9.png", "10.txt", "11.png"}
    assert reasons["3.png"] == reasons["9.png"] == "no caption"
    assert "truncated" in reasons["7.png"]
    assert "no picture" in reasons["8.jpg"]
    assert "without a picture" in reasons["10.txt"]
    assert "UTF-8" in reasons["11.png"]
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text("utf-8").splitlines()]
    assert listed == report.skipped
    assert report.counts["train"] + len(report.skipped) == 12
    shards = ShardSet.open(str(tmp_path / "out"))
    samples = {name: shards.read(index) for index, name in enumerate(names(shards))}
    assert samples["4.png"].members["txt"] == b"x" * 10_000
    assert samples["5.png"].members["txt"].decode() == "naïve 日本\nzwei"
    assert "zoë 日本.png" in samples


def test_one_picture_and_a_wrong_holdout_are_refused(tmp_path):
    source = make_source(tmp_path / "source", 1)
    with pytest.raises(ValueError, match="too few to divide"):
        pack(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"holdout is 1\.5"):
        pack(source, tmp_path / "out", holdout=1.5)
    with pytest.raises(ValueError, match="shard_size is 0"):
        pack(source, tmp_path / "out", split="x", shard_size=0)
    assert os.listdir(tmp_path) == ["source"]
    assert pack(source, tmp_path / "out", split="train").counts == {"train": 1}


@pytest.mark.parametrize("split", [None, "train"])
def test_a_source_without_one_good_picture_leaves_nothing(tmp_path, split):
    source = make_source(tmp_path / "source", 3)
    for number in range(3):
        (source / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"no picture for the split .* can be used \(\d\.png: no picture in a known"):
        pack(source, tmp_path / "out", split=split)
    assert os.listdir(tmp_path) == ["source"]


def test_an_out_folder_with_something_in_it_is_left_alone(tmp_path):
    source = make_source(tmp_path / "source", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="out exists and is not empty"):
        pack(source, tmp_path / "out")
    assert all_files(tmp_path / "out") == {"mine": b"mine"}


def run_pack(*arguments, limit=None):
    code = (
        "import resource, sys\n"
        f"limit = {limit}\n"
        "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "sys.argv = ['softmoe-clip', 'pack', *sys.argv[1:]]\n"
        "from softmoe_clip.cli import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("limit", [40_000, 9_000])
@pytest.mark.parametrize("split", [(), ("--split", "train")])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, limit, split):
    source = make_source(tmp_path / "source", 80)
    result = run_pack(source, tmp_path / "out", *split, limit=limit)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"no space left while writing {tmp_path / 'out'}" in result.stderr
    assert "free some space" in result.stderr
    assert os.listdir(tmp_path) == ["source"]


def test_mistakes_on_the_command_line_are_one_line_that_names_the_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, reason in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "empty", "is empty")):
        result = run_pack(source, tmp_path / "out")
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert f"{source} {reason}" in result.stderr
    assert os.listdir(tmp_path) == ["empty"]


def test_an_error_between_two_samples_leaves_nothing(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source", 20)
    calls = iter(range(100))

    def interrupted(self, *arguments, **options):
        if next(calls) == 13:
            raise KeyboardInterrupt
        return add(self, *arguments, **options)

    add = ShardFiles.add
    monkeypatch.setattr(ShardFiles, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_labels_become_cls_and_reserved_fields_are_ours(tmp_path):
    with ShardWriter(tmp_path / "out") as writer:
        key = writer.add(encoded(noise()), "png", ["a\nb", ""], {"key": "theirs", "more": [1]}, label=7)
    sample = ShardSet.open(str(tmp_path / "out")).read(0)
    about = json.loads(sample.members["json"])
    assert sample.key == key == about["key"] == "000000000"
    assert sample.members["cls"] == b"7"
    assert sample.members["txt"] == b"a b"
    assert about["more"] == [1]


def test_a_file_that_is_too_large_is_skipped_before_it_is_read(tmp_path, monkeypatch):
    source = make_source(tmp_path / "source", 4)
    monkeypatch.setattr(pack_shard, "MAX_FILE_BYTES", 1000)
    with open(source / "2.png", "r+b") as file:
        file.truncate(5000)
    report = pack(source, tmp_path / "out", split="train")
    assert [entry["name"] for entry in report.skipped] == ["2.png"]
    assert "over the limit" in report.skipped[0]["reason"]


def test_the_verb_hands_every_option_on(tmp_path, softmoe_clip):
    for name in ("owl", "red_fox"):
        for number in range(3):
            (tmp_path / "classes" / name).mkdir(parents=True, exist_ok=True)
            noise((64, 48), number).save(tmp_path / "classes" / name / f"{number}.png")
    (tmp_path / "prompts.txt").write_text("a photo of {a}.\nthe {c}\n")
    options = ["--format", "benchmark", "--split", "val", "--templates", tmp_path / "prompts.txt", "--encode", "jpeg"]
    options += ["--quality", "80", "--shorter-side", "24", "--shard-size", "4", "--workers", "1"]
    done = softmoe_clip("pack", tmp_path / "classes", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "6 pictures  val" in done.stdout
    assert "2 classes   owl, red fox\n" in done.stdout
    assert "OUT/SPLIT" in softmoe_clip("pack", "--help").stdout
    shards = ShardSet.open(str(tmp_path / "out" / "val"))
    assert shards.counts == [4, 2]
    picture = Image.open(io.BytesIO(shards.read(0).members["jpg"]))
    assert (picture.format, picture.size) == ("JPEG", (32, 24))
    about = json.loads(shards.read(0).members["json"])
    assert about["captions"] in (["a photo of an owl.", "the owl"], ["a photo of a red fox.", "the red fox"])
    lines = (tmp_path / "out" / "zeroshot_classification_templates.txt").read_text().splitlines()
    assert lines == ["a photo of a {c}.", "the {c}"]


def test_the_verb_takes_columns_and_a_root(tmp_path, softmoe_clip):
    source = make_source(tmp_path / "pictures", 3)
    rows = [f"{number};{number}.png;ein Bild {number};a picture {number}" for number in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(["nr;foto;de;en", *rows]))
    columns = ["--image-column", "foto", "--caption-column", "en", "--caption-column", "de", "--root", source]
    done = softmoe_clip("pack", tmp_path / "t.csv", tmp_path / "out", "--split", "train", *columns)
    assert done.returncode == 0, done.stderr
    assert ShardSet.open(str(tmp_path / "out")).read(1).members["txt"] == b"a picture 1\nein Bild 1"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--format", "tfds"], "the format is 'tfds': choose img2dataset or benchmark"),
        (["--encode", "gif"], "encode is 'gif'"),
        (["--templates", "opnai"], "did you mean openai?"),
        (["--templates", "simple"], "leave out --templates"),
        (["--image-column", "x"], "is no table: leave out --image-column"),
        (["--root", "x"], "is no table: leave out --root"),
        (["--workers", "0"], "workers is 0"),
        (["--split", "../x"], "the split '../x' is no name"),
    ],
)
def test_options_that_can_not_be_are_one_sentence(tmp_path, softmoe_clip, options, reason):
    source = make_source(tmp_path / "source", 3)
    done = softmoe_clip("pack", source, tmp_path / "out", *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert reason in done.stderr
    assert os.listdir(tmp_path) == ["source"]
