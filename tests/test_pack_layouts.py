"""The files that pack writes, as img2dataset, webdataset and clip-benchmark know them."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_pack import all_files, make_source, noise

from softmoe_clip.data_pipelines.pack import pack
from softmoe_clip.data_pipelines.tar_index import ShardSet

# webdataset leaves its files open
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::UserWarning"
)


def make_classes(folder, num_pictures=6, splits=("train", "test")):
    for split in splits:
        for number, name in enumerate(("red_fox", "apple")):
            place = folder / split / name
            place.mkdir(parents=True)
            for picture in range(num_pictures):
                noise(seed=100 * number + picture).save(place / f"{picture}.png")
    return folder


def test_the_parquet_has_a_row_for_each_picture_as_img2dataset_writes_it(tmp_path):
    source = make_source(tmp_path / "source", 7, c2='a "quoted"\nsecond')
    (source / "4.png").write_bytes(b"no picture")
    pack(source, tmp_path / "out", "train", shard_size=5)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        *("00000.parquet", "00000.tar", "00000_stats.json", "00001.parquet", "00001.tar", "00001_stats.json"),
        *("index.npz", "sizes.json", "skipped.jsonl"),
    ]
    table = pq.read_table(out / "00000.parquet")
    assert table.column_names == [
        *("url", "caption", "key", "status", "error_message"),
        *("width", "height", "original_width", "original_height", "exif", "sha256"),
    ]
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == [f"00000000{index}" for index in range(5)]
    assert [row["status"] for row in rows] == ["success"] * 4 + ["failed_to_resize"]
    assert (rows[4]["url"], rows[4]["width"]) == ("4.png", None)
    assert "no picture" in rows[4]["error_message"]
    shards = ShardSet.open(str(out))
    assert shards.keys == [*(row["key"] for row in rows[:4]), "000010000", "000010001"]
    for row, index in zip(rows, range(4), strict=False):
        about = json.loads(shards.read(index).members["json"])
        assert {name: about[name] for name in row} == row
    stats = json.loads((out / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"], stats["failed_to_resize"]) == (5, 4, 0, 1)
    assert stats["status_dict"]["success"] == 4
    assert {"duration", "start_time", "end_time"} <= stats.keys()
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 4, "00001.tar": 2}


def test_a_shard_of_which_nothing_is_left_is_an_empty_tar(tmp_path):
    import webdataset

    source = make_source(tmp_path / "source", 6)
    for number in (2, 3):
        (source / f"{number}.png").write_bytes(b"no picture")
    pack(source, tmp_path / "out", "train", shard_size=2)
    assert ShardSet.open(str(tmp_path / "out")).counts == [2, 0, 2]
    pattern = str(tmp_path / "out" / "{00000..00002}.tar")
    theirs = [sample["__key__"] for sample in webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False)]
    assert theirs == ["000000000", "000000001", "000020000", "000020001"]


def test_webdataset_reads_pictures_captions_and_fields(tmp_path):
    import webdataset

    source = make_source(tmp_path / "source", 6)
    pack(source, tmp_path / "out", "train", shard_size=4)
    pattern = str(tmp_path / "out" / "{00000..00001}.tar")
    dataset = webdataset.WebDataset(pattern, shardshuffle=False).decode("pil").to_tuple("png;jpg", "txt", "json")
    found = list(dataset)
    assert len(found) == 6
    for picture, text, about in found:
        with Image.open(source / about["file_name"]) as original:
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(original))
        assert (
            text.split("\n")
            == about["captions"]
            == (source / about["file_name"]).with_suffix(".txt").read_text("utf-8").strip().split("\n")
        )


def to_array(picture):
    return np.asarray(picture.convert("RGB"))


def build(root, task, split="test"):
    from clip_benchmark.datasets.builder import build_dataset

    return build_dataset("wds/mine", root=str(root), transform=to_array, split=split, task=task)


def test_clip_benchmark_reads_a_set_for_classification(tmp_path):
    source = make_classes(tmp_path / "source")
    prompts = {"{c}": ["a photo of a {c}.", "the {c}"]}
    pack(source, tmp_path / "out", layout="benchmark", shard_size=5, prompts=lambda name: prompts.get(name, [name]))
    out = tmp_path / "out"
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.t*")) == sorted(
        [
            *(f"{split}/{name}" for split in ("train", "test") for name in ("0.tar", "1.tar", "2.tar", "nshards.txt")),
            *("classnames.txt", "zeroshot_classification_templates.txt"),
        ]
    )
    assert (out / "test" / "nshards.txt").read_text() == "3\n"
    dataset = build(out, "zeroshot_classification")
    assert dataset.classes == ["apple", "red fox"]
    assert dataset.templates == ["a photo of a {c}.", "the {c}"]
    found = list(dataset)
    assert len(found) == 12
    originals = {label: {np.asarray(noise(seed=100 * (1 - label) + n)).tobytes() for n in range(6)} for label in (0, 1)}
    assert all(pixels.tobytes() in originals[label] for pixels, label in found)
    assert sorted(label for _, label in found) == [0] * 6 + [1] * 6
    assert ShardSet.open(str(out / "test")).keys == [f"s{index:07d}" for index in range(12)]


def test_clip_benchmark_reads_a_set_for_retrieval(tmp_path):
    source = make_source(tmp_path / "source", 6)
    report = pack(source, tmp_path / "out", layout="benchmark", shard_size=4)
    assert report.counts == {"test": 6}
    assert (tmp_path / "out" / "dataset_type.txt").read_text() == "retrieval\n"
    found = list(build(tmp_path / "out", "zeroshot_retrieval"))
    assert len(found) == 6
    for number, (pixels, captions) in enumerate(found):
        np.testing.assert_array_equal(pixels, np.asarray(noise(seed=number)))
        assert captions == [f"first {number}", f"second {number}"]
    assert not (tmp_path / "out" / "classnames.txt").exists()


def test_labels_and_class_names_are_kept_in_img2datasets_layout_too(tmp_path):
    report = pack(make_classes(tmp_path / "source"), tmp_path / "out")
    assert report.classnames == ("apple", "red fox")
    assert (tmp_path / "out" / "classnames.txt").read_text() == "apple\nred fox\n"
    members = ShardSet.open(str(tmp_path / "out" / "test")).read(0).members
    assert members["txt"].decode() == f"a photo of a {report.classnames[int(members['cls'])]}"


@pytest.mark.parametrize("layout", ["img2dataset", "benchmark"])
def test_packing_what_was_packed_changes_nothing(tmp_path, layout):
    source = make_classes(tmp_path / "source")
    pack(source, tmp_path / "a", layout=layout, shard_size=5)
    pack(tmp_path / "a", tmp_path / "b", layout=layout, shard_size=5)
    assert all_files(tmp_path / "a") == all_files(tmp_path / "b")


def test_pictures_of_parquet_and_of_tars_keep_their_bytes(tmp_path):
    import pyarrow as pa

    pictures = []
    for number in range(4):
        file = io.BytesIO()
        noise(seed=number).save(file, "JPEG")
        pictures.append(file.getvalue())
    (tmp_path / "hf").mkdir()
    table = pa.table({"image": [{"bytes": data, "path": None} for data in pictures], "text": ["a b"] * 4})
    pq.write_table(table, tmp_path / "hf" / "train-00000-of-00001.parquet", row_group_size=3)
    assert pack(tmp_path / "hf", tmp_path / "one").counts == {"train": 4}
    assert pack(tmp_path / "one", tmp_path / "two", shard_size=2).counts == {"train": 4}
    for out in ("one", "two"):
        shards = ShardSet.open(str(tmp_path / out / "train"))
        assert [shards.read(index).members["jpg"] for index in range(4)] == pictures


def test_what_was_left_out_of_a_split_with_nothing_left_is_listed_beside_the_others(tmp_path):
    source = make_source(tmp_path / "source", 2)
    rows = ["filename,caption,split", "0.png,one,train", "1.png,two,train", "gone.png,three,val"]
    (source / "list.csv").write_text("\n".join(rows) + "\n")
    report = pack(source / "list.csv", tmp_path / "out")
    assert report.counts == {"train": 2}
    entry = json.loads((tmp_path / "out/skipped.jsonl").read_text())
    assert (entry["name"], entry["split"]) == ("gone.png", "val")
