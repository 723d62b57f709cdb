"""Class folders read like shards: labels from classes.json, else from the sorted folder names."""

import json
import os
from pathlib import Path

import pytest

from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.eval.class_folders import ClassFolders, open_data
from softmoe_clip.eval.config import TaskConfig


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture " + name.encode())


def classes(folder, *entries):
    listed = [{"index": index, "dir": name, "name": words} for index, name, words in entries]
    (folder / "classes.json").write_text(json.dumps({"classes": listed}))


def test_classes_json_gives_names_and_labels(tmp_path):
    write(tmp_path / "val", "n02/b.JPEG", "n01/a.png", "n02/deeper/é.jpg", "n01/notes.txt")
    classes(tmp_path, (1, "n02", "golf ball"), (0, "n01", "church"), (2, "n03", "not here"))
    data = open_data(str(tmp_path / "val"))
    assert data.classnames == ["church", "golf ball", "not here"]
    samples = [data.read(index) for index in range(len(data))]
    assert [(s.key, s.shard, s.members["cls"], s.members["txt"]) for s in samples] == [
        ("n01/a", "n01", b"0", b"church"),
        ("n02/b", "n02", b"1", b"golf ball"),
        ("n02/deeper/é", "n02", b"1", b"golf ball"),
    ]
    assert samples[1].members["jpeg"] == b"picture n02/b.JPEG"


def test_without_a_classes_json_the_folder_names_are_the_classes(tmp_path):
    write(tmp_path, "red_owl/1.jpg", "ant/2.webp", ".cache/3.jpg")
    assert ClassFolders(tmp_path).classnames == ["ant", "red owl"]


def test_the_pictures_are_those_that_pack_takes(tmp_path):
    names = ["a/1.gif", "a/2.BMP", "a/3.tiff", "a/4.heic", "b/5.png"]
    write(tmp_path, *names, "a/.ipynb_checkpoints/6.png", "a/._7.png", "b/8.txt")
    data = open_data(str(tmp_path))
    assert [path.relative_to(tmp_path).as_posix() for path, _ in data.files] == names
    assert [read_pair(data.read(index)).image for index in range(5)] == [b"picture " + name.encode() for name in names]


OTHER_FOLDERS = {
    "splits of classes": (["train/a/1.jpg", "train/b/1.jpg", "val/a/2.jpg"], r"name one of its folders \(train, val\)"),
    "splits of pictures": (["train/1.jpg", "val/2.jpg"], r"name one of its folders \(train, val\)"),
    "splits of a list": (["classes.json", "new/a/1.jpg", "old/a/2.jpg"], r"name one of its folders \(new, old\)"),
    "splits of shards": (["rare/00000.tar", "val/00000.tar"], r"name one of its folders \(rare, val\)"),
    "a list of captions": (["captions.json", "images/1.jpg"], r"holds captions \(captions\.json\).*: pack it first"),
    "a table": (["metadata.csv", "images/1.jpg"], r"holds captions \(metadata\.csv\).*: pack it first"),
    "captions beside": (["one/1.jpg", "one/1.txt", "two/2.jpg"], r"holds captions \(\.txt files\).*: pack it first"),
}


@pytest.mark.parametrize("kind", OTHER_FOLDERS)
def test_folders_of_splits_and_of_captions_are_not_taken_for_classes(tmp_path, kind):
    names, message = OTHER_FOLDERS[kind]
    write(tmp_path / "set", *names)
    with pytest.raises(ValueError, match=message):
        open_data(str(tmp_path / "set"))


def test_a_class_list_beside_the_split_says_that_it_holds_classes(tmp_path):
    write(tmp_path / "val", "train/1.jpg", "train/1.txt", "metadata.csv")
    classes(tmp_path, (0, "train", "train"))
    assert open_data(str(tmp_path / "val")).classnames == ["train"]


def test_a_task_without_data_is_refused():
    with pytest.raises(ValueError, match="the data of mine is empty"):
        TaskConfig("zero_shot", "mine", "")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(0, "a", "A")], r"folder .*b is no class of .*classes\.json"),
        ([(0, "a", "A"), (2, "b", "B")], "must be 0, 1, 2"),
        ([("x", "a", "A"), (2, "b", "B")], "is not a list of classes"),
    ],
)
def test_a_class_list_that_does_not_fit_is_named(tmp_path, entries, message):
    write(tmp_path / "val", "a/1.jpg", "b/1.jpg")
    classes(tmp_path, *entries)
    with pytest.raises(ValueError, match=message):
        ClassFolders(tmp_path / "val")


def test_folders_without_pictures_are_named(tmp_path):
    write(tmp_path / "val", "a/1.txt")
    with pytest.raises(ValueError, match="no pictures"):
        ClassFolders(tmp_path / "val")


def test_a_broken_class_list_is_named(tmp_path):
    write(tmp_path / "val", "a/1.jpg")
    (tmp_path / "classes.json").write_text("{")
    with pytest.raises(ValueError, match=r"classes\.json is not a list of classes"):
        ClassFolders(tmp_path / "val")


@pytest.mark.skipif("SOFTMOE_CLIP_DATA" not in os.environ, reason="SOFTMOE_CLIP_DATA is not set")
@pytest.mark.parametrize(
    ("split", "num_classes", "num_pictures"),
    [("imagenette/val", 10, 500), ("cifar10/test", 10, 1000), ("imagenet_samples/val", 1000, 500)],
)
def test_real_class_folders_are_read_whole(split, num_classes, num_pictures):
    data = open_data(str(Path(os.environ["SOFTMOE_CLIP_DATA"]) / split))
    assert (len(data.classnames), len(data)) == (num_classes, num_pictures)
