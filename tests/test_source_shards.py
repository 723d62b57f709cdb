"""Shards as a source: members by the loader's rules, and what a folder with a tar in it is."""

import pytest
from tars import write_tar
from test_sources import picture

from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.sources import read_source
from softmoe_clip.data_pipelines.tar_index import ShardSet


@pytest.mark.parametrize(
    ("image", "text", "content"),
    [
        ("jpg", "caption", b"a dog"),
        ("jpg", "text", b"a dog\na pet"),
        ("jpg", "cap", b"a dog"),
        ("left.jpg", "caption.txt", b"a dog"),
        ("left.jpg", "meta.json", b'{"caption": "a dog", "url": "u"}'),
        ("left.jpg", "json", b'["a dog"]'),
    ],
)
def test_members_of_shards_are_taken_by_the_loaders_rules(tmp_path, image, text, content):
    data = picture(tmp_path / "x.jpg").read_bytes()
    shard = write_tar(tmp_path / "shards" / "0.tar", [(f"s0.{image}", data), (f"s0.{text}", content)])
    pair = read_pair(ShardSet.open(str(shard)).read(0))
    (item,) = read_source(shard).items
    assert (item.problem, item.captions, item.read()) == (None, pair.captions, pair.image)
    assert item.extra == ({"url": "u"} if text == "meta.json" else {})


def test_a_damaged_text_leaves_no_picture_unreported(tmp_path):
    members = [("s0.txt", b"a dog"), ("s1.caption", b"\xff"), ("s1.jpg", b"x")]
    first, second = read_source(write_tar(tmp_path / "0.tar", members)).items
    assert (first.problem or "").startswith("no picture (.jpg")
    assert second.problem == "its .caption is not UTF-8"


@pytest.mark.parametrize(
    "names", [["a.jpg", "b.jpg"], ["fox/a.jpg", "owl/b.jpg"], ["train/fox/a.jpg", "train/owl/b.jpg"], ["deep/a.jpg"]]
)
def test_a_leftover_tar_does_not_hide_the_pictures_of_a_folder(tmp_path, names):
    for name in names:
        image = picture(tmp_path / name)
        if len(names) == 1 or "/" not in name:
            image.with_suffix(".txt").write_text("one")
    write_tar(tmp_path / "backup.tar", [("old.jpg", image.read_bytes()), ("old.txt", b"old")])
    assert sorted(item.name for item in read_source(tmp_path).items) == names


def test_class_folders_with_a_tar_in_each_are_read_as_pictures(tmp_path):
    for name in ("fox/a.jpg", "owl/b.jpg"):
        image = picture(tmp_path / name)
        write_tar(image.with_name("backup.tar"), [("old.jpg", image.read_bytes()), ("old.txt", b"old")])
    assert read_source(tmp_path).classnames == ("fox", "owl")


@pytest.mark.parametrize("source", ["http://x.invalid/{00000..00003}.tar", "shards/0.tar::s3://bucket/0.tar"])
def test_remote_shards_are_refused_before_anything_is_opened(monkeypatch, source):
    monkeypatch.setattr(ShardSet, "open", lambda pattern: pytest.fail("opened"))
    with pytest.raises(ValueError, match=r"(http|s3)://\S* is not on this machine: copy the shards to a local folder"):
        read_source(source)
