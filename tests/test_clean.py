"""check --fix: shards without what is wrong, with right counts, and every sample accounted for."""

import gzip
import json
import tarfile

import pytest
from picture_shards import encoded, png, scene, whole
from tars import write_tar

from softmoe_clip.data_pipelines.check import check
from softmoe_clip.data_pipelines.clean import write_clean
from softmoe_clip.data_pipelines.ledger import read_ledger
from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.tar_index import ShardSet


@pytest.fixture
def spoilt(tmp_path):
    """Two shards with one fault of each kind that costs a sample."""
    near = encoded(scene(0).resize((70, 70)))
    about = json.dumps({"licence": "free", "key": "old"}).encode()
    (tmp_path / "in").mkdir()
    write_tar(
        tmp_path / "in" / "0.tar",
        [
            *whole("a", 0),
            ("a.json", about),
            *whole("b", 1),
            ("c.png", png(2)[:300]),
            ("c.txt", b"cut"),
            *whole("a", 3),
            ("d.png", png(0)),
            ("d.txt", b"another caption\nCaption  0"),
        ],
    )
    write_tar(tmp_path / "in" / "1.tar", [("e.png", near), ("e.txt", b"smaller"), ("f.png", png(4)), *whole("g", 1)])
    (tmp_path / "in" / "sizes.json").write_text(json.dumps({"0.tar": 7, "1.tar": 3}))
    (tmp_path / "in" / "2.tar").write_bytes(b"no tar")
    return tmp_path / "in"


def samples(folder):
    shards = ShardSet.open(str(folder))
    return [shards.read(index) for index in range(len(shards))]


def test_clean_shards_have_no_errors_and_the_counts_add_up(spoilt, tmp_path):
    report = check(str(spoilt))
    assert report.num_errors == 5  # two pictures, a key, a tar, a count
    cleaned = write_clean(report, tmp_path / "out", shard_size=3)
    assert cleaned == (4, 2, 2)
    assert sum(cleaned) == report.num_samples
    again = check(str(tmp_path / "out"))
    assert (again.num_samples, again.num_errors) == (4, 0)
    assert {finding["kind"] for finding in again.findings} == {"near picture"}
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 1}
    skipped = read_ledger(tmp_path / "out" / "skipped.jsonl")
    assert [(entry["key"], entry["shard"]) for entry in skipped] == [
        ("c", "0.tar"), ("d", "0.tar"), ("f", "1.tar"), ("g", "1.tar"),
    ]  # fmt: skip
    assert "truncated" in skipped[0]["reason"]
    assert skipped[1]["reason"] == "the same picture as a, joined"


def test_doubles_give_their_captions_to_the_first_and_pictures_keep_their_bytes_and_fields(spoilt, tmp_path):
    write_clean(check(str(spoilt)), tmp_path / "out")
    first, second, *_ = samples(tmp_path / "out")
    assert read_pair(first).captions == ("caption 0", "another caption")
    assert read_pair(first).image == png(0)
    about = json.loads(first.members["json"])
    assert about["licence"] == "free"
    assert (about["key"], about["source_key"], about["source_shard"]) == ("000000000", "a", "0.tar")
    assert read_pair(second).captions == ("caption 1",), "the double had the same one"


def test_leaks_are_left_out_too(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    write_tar(tmp_path / "train" / "0.tar", [*whole("a", 0), *whole("b", 1), *whole("c", 0), *whole("d", 3)])
    write_tar(
        tmp_path / "val" / "0.tar", [*whole("x", 0), ("y.png", encoded(scene(3).resize((64, 64)))), ("y.txt", b"y")]
    )
    report = check(str(tmp_path / "train"), against=str(tmp_path / "val"))
    assert write_clean(report, tmp_path / "out") == (1, 3, 0)
    assert read_pair(samples(tmp_path / "out")[0]).captions == ("caption 1",)


def test_labels_stay(tmp_path):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "0.tar", [("a.jpeg", encoded(scene(0), "JPEG")), ("a.cls", b"7"), ("b.png", b"")])
    write_clean(check(str(tmp_path / "in")), tmp_path / "out")
    (sample,) = samples(tmp_path / "out")
    assert (read_pair(sample).label, read_pair(sample).captions) == (7, ())
    assert "jpg" in sample.members


def test_nothing_good_writes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "0.tar", [("a.png", b""), ("a.txt", b"a")])
    with pytest.raises(ValueError, match="no sample is good"):
        write_clean(check(str(tmp_path / "in")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("picture", ["png", "left.png"])
def test_all_members_of_a_sample_stay_byte_for_byte_and_in_order(tmp_path, picture):
    mask, packed, name = png(9), gzip.compress(b"a text"), "x" * 120 + ".npy"
    members = [
        ("txt.gz", packed), ("json", b'{"licence": "free"}'), ("right.seg.bmp", mask), (picture, png(0)),
        ("cls", b"7\n"), ("txt", b"\xef\xbb\xbf a  caption \r\n\r\nanother\n"), (name, b""), ("meta.xml", b"<a/>"),
    ]  # fmt: skip
    double = [("b.seg.png", b"lost"), ("b.png", png(0)), ("b.txt", b"a third caption")]
    members = [(f"a.{name}", data) for name, data in members]
    alone = write_tar(tmp_path / "alone" / "0.tar", members, tarfile.GNU_FORMAT)
    joined = write_tar(tmp_path / "joined" / "0.tar", [*members, *double], tarfile.GNU_FORMAT)
    for tar, texts in ((alone, None), (joined, b"a caption\nanother\na third caption")):
        write_clean(check(str(tar)), tmp_path / "out" / tar.parent.name)
        (sample,) = samples(tmp_path / "out" / tar.parent.name)
        expected = {"png" if name == f"a.{picture}" else name.removeprefix("a."): data for name, data in members}
        assert list(sample.members) == list(expected)
        if texts:
            expected |= {"json": sample.members["json"], "txt": texts}
        assert sample.members == expected
        assert json.loads(sample.members["json"])["licence"] == "free"


def test_captions_that_no_txt_holds_get_one(tmp_path):
    first = [("a.png", png(0)), ("a.caption", b"a caption"), ("a.txt", b"  \n")]
    second = [("b.png", png(1)), ("b.json", b'{"captions": ["one", "two"]}')]
    write_tar(tmp_path / "in" / "0.tar", [*first, *second])
    write_clean(check(str(tmp_path / "in")), tmp_path / "out")
    one, two = samples(tmp_path / "out")
    assert (one.members["caption"], one.members["txt"]) == (b"a caption", b"a caption")
    assert two.members["txt"] == b"one\ntwo"


OWN_FIELDS = b'{"key": {"of": "a licence"}, "captions": "see .txt"}'


@pytest.mark.parametrize("double", [None, b"TURKEY in the snow\n"])
def test_a_sample_that_gains_no_caption_keeps_its_own_as_they_are(tmp_path, double):
    members = [("png", png(0)), ("txt", b"Turkey in the snow\nturkey in the snow\n"), ("json", OWN_FIELDS)]
    others = [] if double is None else [("b.png", png(0)), ("b.txt", double)]
    write_tar(tmp_path / "in" / "0.tar", [*((f"a.{name}", data) for name, data in members), *others])
    write_clean(check(str(tmp_path / "in")), tmp_path / "out")
    (sample,) = samples(tmp_path / "out")
    assert sample.members == dict(members)


def test_captions_that_equal_each_other_stay_where_others_join_them_once(tmp_path):
    first = [("a.png", png(0)), ("a.txt", b"One\none"), ("a.json", b'["One", "one"]')]
    second = [("b.png", png(0)), ("b.txt", b"ONE\ntwo\nTwo")]
    write_tar(tmp_path / "in" / "0.tar", [*first, *second])
    write_clean(check(str(tmp_path / "in")), tmp_path / "out")
    (sample,) = samples(tmp_path / "out")
    assert sample.members["txt"] == b"One\none\ntwo"
    assert sample.members["json"] == b'["One", "one"]', "a list has no fields to write captions to"


def test_equal_pictures_with_different_labels_are_named_and_not_joined(tmp_path):
    labels = {"a": 0, "b": 1, "c": 1, "d": None, "e": 0}
    members = []
    for key, label in labels.items():
        members += [(f"{key}.png", png(0)), (f"{key}.txt", f"caption {key}".encode())]
        members += [] if label is None else [(f"{key}.cls", str(label).encode())]
    write_tar(tmp_path / "in" / "0.tar", members)
    report = check(str(tmp_path / "in"))
    kinds = [(found["kind"], found["key"], found["other"]) for found in report.findings]
    assert kinds == [
        (kind, key, "a in 0.tar") for kind, keys in (("other label", "bc"), ("same picture", "de")) for key in keys
    ]
    reason = "the same bytes as a in 0.tar, but the label is 1 here and 0 there: correct one"
    assert report.findings[0]["reason"] == reason
    assert write_clean(report, tmp_path / "out") == (2, 0, 3)
    pairs = [read_pair(sample) for sample in samples(tmp_path / "out")]
    assert [(pair.label, pair.captions) for pair in pairs] == [
        (0, ("caption a", "caption d", "caption e")),
        (1, ("caption b", "caption c")),
    ]


def test_a_label_is_not_lost_to_an_equal_picture_without_one(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", [*whole("a", 0), *whole("b", 0), ("b.cls", b"3")])
    report = check(str(tmp_path / "in"))
    assert "the label is 3 here and none there" in report.findings[0]["reason"]
    write_clean(report, tmp_path / "out")
    assert [read_pair(sample).label for sample in samples(tmp_path / "out")] == [None, 3]
