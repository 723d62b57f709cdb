"""Sources with classes: folders, torchvision's data sets, and shards taken apart again."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image
from tars import write_tar
from test_sources import picture

from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.sources import read_source


def about(items):
    return {item.name: (item.split, item.label, item.captions) for item in items}


def test_class_folders_with_splits_take_names_and_labels_from_classes_json(tmp_path):
    for name in ("train/n01/a.jpg", "train/n02/b.JPEG", "val/n01/deep/c.png", "val/n01/notes.md"):
        picture(tmp_path / name) if not name.endswith("md") else (tmp_path / name).write_text("x")
    classes = [{"index": 1, "dir": "n01", "name": "golf ball"}, {"index": 0, "dir": "n02", "name": "tench"}]
    (tmp_path / "classes.json").write_text(json.dumps({"classes": classes}), "utf-8-sig")
    source = read_source(tmp_path)
    assert source.classnames == ("tench", "golf ball")
    assert about(source.items) == {
        "train/n01/a.jpg": ("train", 1, ("a photo of a golf ball",)),
        "train/n02/b.JPEG": ("train", 0, ("a photo of a tench",)),
        "val/n01/deep/c.png": ("val", 1, ("a photo of a golf ball",)),
    }
    one = read_source(tmp_path / "val")
    assert about(one.items) == {"val/n01/deep/c.png": ("val", 1, ("a photo of a golf ball",))}
    assert [item.path for item in one.items] == [tmp_path / "val" / "n01" / "deep" / "c.png"]


@pytest.mark.parametrize("splits", [["train", "test"], [None]])
def test_class_folders_without_a_list_are_named_by_their_folders(tmp_path, splits):
    for split in splits:
        for name in ("red_fox/a.jpg", "owl/b.jpg"):
            picture(tmp_path / (split or ".") / name)
    picture(tmp_path / (splits[-1] or ".") / "zebra" / "c.jpg")  # a class that one split has not
    source = read_source(tmp_path, prompts=lambda name: [f"a {name}", f"the {name}"])
    assert source.classnames == ("owl", "red fox", "zebra")
    assert {(item.split, item.label, item.captions[1]) for item in source.items} == {
        *((split, label, f"the {name}") for split in splits for label, name in enumerate(("owl", "red fox"))),
        (splits[-1], 2, "the zebra"),
    }


def test_classes_are_mixed_so_that_no_shard_holds_one_class_only(tmp_path):
    for name in ("a", "b"):
        for number in range(20):
            picture(tmp_path / name / f"{number}.png")
    labels = [item.label for item in read_source(tmp_path).items]
    assert 5 <= sum(labels[:20]) <= 15


def test_folders_with_one_class_or_with_texts_are_no_class_folders(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    with pytest.raises(ValueError, match=r"none of the 1 pictures in .* has a caption: put X\.txt"):
        read_source(tmp_path)
    picture(tmp_path / "more" / "b.jpg")
    (tmp_path / "more" / "b.txt").write_text("one")
    assert read_source(tmp_path).classnames == ()


@pytest.mark.parametrize("stray", ["README.txt", "wnids.txt", "fox/words.txt", "fox/deep/a.txt", "notes/b.txt"])
@pytest.mark.parametrize("split", [".", "train"])
def test_a_stray_text_does_not_hide_class_folders(tmp_path, split, stray):
    for name in ("fox/a.jpg", "owl/b.jpg"):
        picture(tmp_path / split / name)
    (tmp_path / split / stray).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / split / stray).write_text("about these pictures")
    found = about(read_source(tmp_path).items)
    assert {captions for _, _, captions in found.values()} == {("a photo of a fox",), ("a photo of a owl",)}


def test_captions_beside_pictures_or_in_a_folder_of_their_own_make_no_classes(tmp_path):
    picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one")
    with pytest.raises(ValueError, match=r"none of the 1 pictures in .* has a caption: put X\.txt"):
        read_source(tmp_path)
    (tmp_path / "images" / "a.jpg.txt").write_text("one")
    assert read_source(tmp_path).classnames == ()


def cifar10(folder, monkeypatch, num_pictures=20):
    """Write the six batches and batches.meta as torchvision unpacks them, with checksums of their own."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng, sums = np.random.default_rng(0), {}
    for number, (name, _) in enumerate(CIFAR10.train_list + CIFAR10.test_list):
        data = rng.integers(0, 256, (num_pictures, 3072), np.uint8)
        labels = rng.integers(0, 10, num_pictures).tolist()
        names = [f"p{number}_{row}.png" for row in range(num_pictures)]
        batch = {"batch_label": name, "labels": labels, "data": data, "filenames": names}
        (base / name).write_bytes(pickle.dumps(batch))
        sums[name] = (data, labels)
    meta = {"label_names": [*"abcdefghij"], "num_cases_per_batch": num_pictures, "num_vis": 3072}
    (base / "batches.meta").write_bytes(pickle.dumps(meta))
    for attribute in ("train_list", "test_list"):
        listed = [[name, calculate_md5(str(base / name))] for name, _ in getattr(CIFAR10, attribute)]
        monkeypatch.setattr(CIFAR10, attribute, listed)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": calculate_md5(str(base / "batches.meta"))})
    return sums


def test_cifar10_from_torchvision_keeps_pixels_labels_and_splits(tmp_path, monkeypatch):
    import io

    sums = cifar10(tmp_path, monkeypatch)
    source = read_source("torchvision:CIFAR10", root=tmp_path)
    assert source.classnames == tuple("abcdefghij")
    items = {item.name: item for item in source.items}
    assert sorted(items) == [f"test/{n:07d}" for n in range(20)] + [f"train/{n:07d}" for n in range(100)]
    data, labels = sums["data_batch_2"]
    item = items["train/0000025"]
    assert (item.split, item.label, item.captions) == ("train", labels[5], (f"a photo of a {'abcdefghij'[labels[5]]}",))
    pixels = np.asarray(Image.open(io.BytesIO(pickle.loads(pickle.dumps(item.read))())))
    np.testing.assert_array_equal(pixels, data[5].reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar10_is_packed_for_training_and_for_evaluation(tmp_path, monkeypatch):
    from softmoe_clip.data_pipelines.pack import pack
    from softmoe_clip.data_pipelines.tar_index import ShardSet

    cifar10(tmp_path / "root", monkeypatch)
    report = pack("torchvision:CIFAR10", tmp_path / "out", root=tmp_path / "root", shard_size=40)
    assert report.counts == {"train": 100, "test": 20}
    assert ShardSet.open(str(tmp_path / "out" / "train")).counts == [40, 40, 20]
    pack("torchvision:CIFAR10", tmp_path / "wds", "test", layout="benchmark", root=tmp_path / "root")
    members = ShardSet.open(str(tmp_path / "wds" / "test")).read(0).members
    assert members.keys() == {"png", "cls", "json"}
    assert (tmp_path / "wds" / "classnames.txt").read_text().split() == [*"abcdefghij"]


def test_torchvision_sets_without_files_or_of_an_unknown_name_are_refused(tmp_path, monkeypatch):
    from urllib.error import URLError

    from torchvision.datasets import cifar

    def no_network(*arguments, **options):
        raise URLError("no network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", no_network)
    with pytest.raises(ValueError, match=r"CIFAR10 is not in .* and can't be downloaded \(no network\): put"):
        read_source("torchvision:CIFAR10", root=tmp_path)
    with pytest.raises(ValueError, match=r"no data set 'cifar10': did you mean CIFAR10\?"):
        read_source("torchvision:cifar10", root=tmp_path)
    with pytest.raises(ValueError, match=r"no data set 'os'"):
        read_source("torchvision:os", root=tmp_path)


def test_shards_are_taken_apart_with_captions_fields_and_bytes(tmp_path):
    data = picture(tmp_path / "x.png").read_bytes()
    for split in ("train", "val"):
        with ShardWriter(tmp_path / "shards" / split, 2) as writer:
            for number in range(3):
                writer.add(data, "png", [f"one {number}", "two"], {"file_name": f"{split}{number}.png", "url": "u"})
    source = read_source(tmp_path / "shards")
    assert about(source.items) == {
        f"{split}{number}.png": (split, None, (f"one {number}", "two"))
        for split in ("train", "val")
        for number in range(3)
    }
    assert {item.read() for item in source.items} == {data}
    assert source.items[0].extra == {"file_name": "train0.png", "url": "u"}
    one = read_source(str(tmp_path / "shards" / "val" / "{00000..00001}.tar")).items
    assert [item.name for item in one] == ["val0.png", "val1.png", "val2.png"]


def test_shards_of_img2dataset_and_of_clip_benchmark_are_sources_too(tmp_path):
    data = picture(tmp_path / "x.jpg").read_bytes()

    fields = {"url": "http://x", "caption": "a dog", "key": "000000003", "status": "success", "width": 8, "exif": "{}"}
    members = {"jpg": data, "txt": b"a dog", "json": json.dumps(fields).encode()}
    write_tar(tmp_path / "img" / "00000.tar", [(f"000000003.{name}", data) for name, data in members.items()])
    (tmp_path / "img" / "00000.parquet").write_bytes(b"not read")
    (item,) = read_source(tmp_path / "img").items
    assert (item.name, item.captions, item.extra, item.read()) == (
        "000000003",
        ("a dog",),
        {"url": "http://x"},
        data,
    )
    write_tar(tmp_path / "wds" / "test" / "0.tar", [("s0.webp", data), ("s0.cls", b"1"), ("s1.cls", b"0")])
    (tmp_path / "wds" / "classnames.txt").write_text("tench\ngolf ball\n")
    source = read_source(tmp_path / "wds")
    assert source.classnames == ("tench", "golf ball")
    assert about(source.items)["s0"] == ("test", 1, ("a photo of a golf ball",))
    assert "no picture" in source.items[1].problem


def test_shards_inside_a_folder_of_pictures_do_not_make_it_a_source_of_shards(tmp_path):
    data = picture(tmp_path / "a.png").read_bytes()
    (tmp_path / "a.txt").write_text("one")
    with ShardWriter(tmp_path / "shards") as writer:
        writer.add(data, "png", ["packed"])
    assert about(read_source(tmp_path).items) == {"a.png": (None, None, ("one",))}


def test_packing_class_folders_into_themselves_is_refused(tmp_path):
    from softmoe_clip.data_pipelines.pack import pack

    for name in ("fox/a.png", "owl/b.png"):
        picture(tmp_path / "classes" / name)
    with pytest.raises(ValueError, match="lies inside the source, where it would be one more class"):
        pack(tmp_path / "classes", tmp_path / "classes" / "shards")
    assert sorted(path.name for path in (tmp_path / "classes").iterdir()) == ["fox", "owl"]


def test_a_damaged_tar_gives_what_is_before_the_damage_and_is_listed(tmp_path):
    from softmoe_clip.data_pipelines.pack import pack

    data = picture(tmp_path / "x.png").read_bytes()
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(6):
            writer.add(data, "png", [f"caption {number}"])
    tar = tmp_path / "shards" / "00000.tar"
    tar.write_bytes(tar.read_bytes()[:7000])
    report = pack(tmp_path / "shards", tmp_path / "out", "train")
    assert report.counts == {"train": 2}
    assert [entry["name"] for entry in report.skipped] == ["000000002", "00000.tar"]
    assert "cut off" in report.skipped[1]["reason"]
