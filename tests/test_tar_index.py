import io
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tars import write_tar

from softmoe_clip.data_pipelines import tar_index
from softmoe_clip.data_pipelines.tar_index import INDEX_NAME, ShardSet, load_index
from softmoe_clip.data_pipelines.tar_walk import index_tar, split_name


def some_members(number, seed=0):
    rng = random.Random(seed)
    return [
        (f"{key:09d}.{extension}", rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000])))
        for key in range(number)
        for extension in ("jpg", "txt", "json")
    ]


def read_all(shards):
    return [(s.key, s.members) for s in map(shards.read, range(len(shards)))]


def as_samples(members):
    samples = {}
    for name, data in members:
        key, extension = split_name(name)
        samples.setdefault(key, {})[extension] = data
    return list(samples.items())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1700000000.25])
@pytest.mark.parametrize("prefix", ["", "./", "some/folder.with.dots/", "é日本/"])
def test_samples_are_what_tarfile_reads(tmp_path, format, mtime, prefix):
    members = [(prefix + name, data) for name, data in some_members(20)]
    write_tar(tmp_path / "s" / "0.tar", members, format, mtime)
    shards = ShardSet.open(tmp_path.joinpath("s").as_posix())
    assert read_all(shards) == as_samples(members)
    assert shards.problems == []


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_fall_back_to_tarfile(tmp_path, format):
    members = [("x" * 150 + "/" + "y" * 120 + name, data) for name, data in some_members(5)]
    write_tar(tmp_path / "0.tar", [*some_members(2, seed=1), *members], format)
    shards = ShardSet.open(tmp_path.as_posix())
    assert read_all(shards) == as_samples(some_members(2, seed=1)) + as_samples(members)


def test_a_name_in_two_parts_is_put_together(tmp_path):
    members = [
        ("folder/" * 20 + name, data) for name, data in some_members(3)
    ]  # beyond 100 bytes: ustar's prefix field
    write_tar(tmp_path / "0.tar", members)
    assert read_all(ShardSet.open(tmp_path.as_posix())) == as_samples(members)


def test_folders_links_hidden_and_nameless_members_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("d.x", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        for name in ("README", ".hidden.jpg", "d/._a.jpg", "__meta__", "A.b.JPG", "d.x/a.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    assert read_all(ShardSet.open(tmp_path.as_posix())) == [("A", {"b.jpg": b"abc"}), ("d.x/a", {"jpg": b"abc"})]


def test_members_of_a_key_may_lie_apart_and_a_repeated_one_begins_a_new_sample(tmp_path):
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("b.txt", b"3"), ("a.txt", b"4"), ("a.jpg", b"5"), ("a.txt", b"6")]
    write_tar(tmp_path / "0.tar", members)
    assert read_all(ShardSet.open(tmp_path.as_posix())) == [
        ("a", {"jpg": b"1", "txt": b"4"}),
        ("b", {"jpg": b"2", "txt": b"3"}),
        ("a", {"jpg": b"5", "txt": b"6"}),
    ]


def test_a_cut_tar_gives_its_whole_members_and_says_where_it_ends(tmp_path):
    members = some_members(4)
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    end = whole.rindex(b"ustar") - 257 + 512 + 512 * -(-len(members[-1][1]) // 512)
    cut_path = tmp_path / "cut" / "0.tar"
    cut_path.parent.mkdir()
    for cut in range(300, end + 1, 200):
        cut_path.write_bytes(whole[:cut])
        part = index_tar(cut_path)
        complete = [
            index for index, (offset, size) in enumerate(zip(*sorted_spans(whole), strict=True)) if offset + size <= cut
        ]
        assert len(part.offsets) == len(complete)
        assert len(part.problems) == 1
        assert part.problems[0].startswith("0.tar: cut off")
    cut_path.write_bytes(whole[: end + 512])
    assert index_tar(cut_path).problems == []


def sorted_spans(whole):
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        infos = tar.getmembers()
    return [info.offset_data for info in infos], [info.size for info in infos]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_a_damaged_header_ends_the_tar_with_its_place(tmp_path, format):
    name = "é" * 60 if format == tarfile.PAX_FORMAT else "e"  # the long name takes the other walk
    members = [(f"{name}{key}.jpg", b"x" * 1000) for key in range(6)]
    path = write_tar(tmp_path / "0.tar", members, format)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        place = tar.getmembers()[3].offset
    data[place + 120 : place + 160] = b"\xff" * 40
    path.write_bytes(data)
    shards = ShardSet.open(tmp_path.as_posix())
    assert read_all(shards) == as_samples(members[:3])
    assert len(shards.problems) == 1
    assert "0.tar: damaged" in shards.problems[0]


def test_tars_put_together_say_once_that_the_second_is_not_read(tmp_path, capsys, monkeypatch):
    one, two = (write_tar(tmp_path / f"in{seed}.tar", some_members(3, seed)).read_bytes() for seed in (1, 2))
    for name, rank in (("together", "0"), ("elsewhere", "1")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.tar").write_bytes(one + two)
        monkeypatch.setenv("RANK", rank)
        shards = [ShardSet.open(str(tmp_path / name)) for _ in range(2)]
        assert len(shards[0]) == 3
        assert "end mark" in shards[0].problems[0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("1 of 1 shards damaged, `softmoe-clip check` lists them: together.tar: has an end mark")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0.tar is empty"),
        (b"<html>404</html>", "0.tar is not a tar"),
        (bytes(range(256)) * 100, "0.tar is not a tar"),
        (b"\x1f\x8b" + bytes(1000), "0.tar is compressed"),
        (bytes(10240), "hold no samples"),
    ],
)
def test_what_is_no_tar_is_refused_by_name(tmp_path, content, reason):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        ShardSet.open(tmp_path.as_posix())


def test_the_index_is_used_again_and_the_same(tmp_path, monkeypatch):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", some_members(5, number))
    first = ShardSet.open(tmp_path.as_posix())
    monkeypatch.setattr(tar_index, "index_tar", lambda path: pytest.fail("indexed again"))
    second = ShardSet.open(tmp_path.as_posix())
    assert read_all(second) == read_all(first)
    assert second.fingerprint() == first.fingerprint()
    assert second.counts == [5, 5, 5]
    assert len(second.keys) == len(second) == 15


def test_new_and_changed_tars_are_indexed_anew(tmp_path):
    write_tar(tmp_path / "0.tar", some_members(5, 0))
    before = ShardSet.open(tmp_path.as_posix())
    write_tar(tmp_path / "1.tar", some_members(4, 1))
    assert len(ShardSet.open(tmp_path.as_posix())) == 9
    size = (tmp_path / "0.tar").stat().st_size
    other = [("aaaaaaaaa.jpg", b"1"), ("bbbbbbbbb.jpg", b"2")]
    (tmp_path / "0.tar").write_bytes(write_tar(tmp_path / "in.x", other).read_bytes().ljust(size, b"\0")[:size])
    assert (tmp_path / "0.tar").stat().st_size == size
    after = ShardSet.open(str(tmp_path / "0.tar"))
    assert read_all(after) == as_samples(other)
    assert after.fingerprint() != before.fingerprint()


def test_a_folders_index_keeps_the_shards_that_a_pattern_leaves_out(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", some_members(2, seed=number))
    for pattern in ("0.tar", "{1..2}.tar", "2.tar"):
        ShardSet.open(str(tmp_path / pattern))
    assert sorted(load_index(tmp_path / INDEX_NAME)) == ["0.tar", "1.tar", "2.tar"]
    (tmp_path / "1.tar").unlink()
    write_tar(tmp_path / "3.tar", some_members(1, seed=3))
    ShardSet.open(str(tmp_path / "3.tar"))
    assert sorted(load_index(tmp_path / INDEX_NAME)) == ["0.tar", "2.tar", "3.tar"]


def test_a_tar_that_changed_in_the_middle_is_noticed_when_read(tmp_path):
    members = [(f"{key}.jpg", b"x" * 600) for key in range(5)]
    path = write_tar(tmp_path / "0.tar", members)
    ShardSet.open(tmp_path.as_posix())
    path.unlink()
    members[2] = ("2.png", b"x" * 600)
    write_tar(path, members)
    shards = ShardSet.open(tmp_path.as_posix())
    assert shards.read(1).key == "1"
    with pytest.raises(ValueError, match=r"0\.tar has changed .* delete .*index\.npz"):
        shards.read(2)


def test_a_damaged_index_is_made_again(tmp_path):
    members = some_members(5)
    write_tar(tmp_path / "0.tar", members)
    ShardSet.open(tmp_path.as_posix())
    good = (tmp_path / INDEX_NAME).read_bytes()
    rng = random.Random(0)
    for _ in range(30):
        bad = bytearray(good[: rng.randrange(len(good))] if rng.random() < 0.5 else good)
        for _ in range(min(len(bad), 20)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        (tmp_path / INDEX_NAME).write_bytes(bad)
        assert read_all(ShardSet.open(tmp_path.as_posix())) == as_samples(members)


def test_an_index_with_pickles_is_not_read(tmp_path):
    np.savez(tmp_path / "index.npz", text=np.array([{"version": 1}], dtype=object))
    assert load_index(tmp_path / "index.npz") == {}


def test_where_the_folder_refuses_the_index_goes_to_the_cache(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    write_tar(folder / "0.tar", some_members(5))
    (folder / INDEX_NAME).mkdir()  # as for a folder without write permission, which root has none of
    first = ShardSet.open(str(folder))
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    monkeypatch.setattr(tar_index, "index_tar", lambda path: pytest.fail("indexed again"))
    assert read_all(ShardSet.open(str(folder))) == read_all(first)
    assert [path.name for path in folder.iterdir() if "partial" in path.name] == []


def test_many_shards_keep_few_files_open_and_a_pickled_set_reads_the_same(tmp_path):
    num_shards = tar_index.MAX_OPEN_SHARDS + 40
    one = write_tar(tmp_path / "one.x", some_members(2)).read_bytes()
    (tmp_path / "s").mkdir()
    for number in range(num_shards):
        (tmp_path / "s" / f"{number:05d}.tar").write_bytes(one)
    shards = ShardSet.open(str(tmp_path / "s"))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    order = random.Random(0).sample(range(len(shards)), len(shards))
    read = {index: shards.read(index) for index in order}
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) - before <= tar_index.MAX_OPEN_SHARDS
    copy = pickle.loads(pickle.dumps(shards))
    assert all(copy.read(index) == sample for index, sample in read.items())
    assert read[5].shard == "00002.tar"


def test_the_fingerprint_tells_sets_apart_but_not_their_places(tmp_path):
    write_tar(tmp_path / "a" / "0.tar", some_members(3))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_tar(tmp_path / "c" / "1.tar", some_members(3))
    write_tar(tmp_path / "d" / "0.tar", some_members(3, seed=1))
    prints = [ShardSet.open(str(tmp_path / name)).fingerprint() for name in "abcd"]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_the_fingerprint_tells_where_the_bytes_of_a_sample_lie(tmp_path):
    """The same keys in tars of the same size: the order of samples is the same, but not what they hold."""
    for name, sizes in (("a", (100, 200)), ("b", (200, 100))):
        write_tar(tmp_path / name / "0.tar", [(f"{i}.jpg", bytes(size)) for i, size in enumerate(sizes)])
    one, other = (ShardSet.open(str(tmp_path / name)) for name in "ab")
    assert one.num_bytes(0) == other.num_bytes(0)
    assert one.fingerprint() != other.fingerprint()


def test_a_sample_beyond_the_end_is_an_index_error(tmp_path):
    write_tar(tmp_path / "0.tar", some_members(3))
    shards = ShardSet.open(tmp_path.as_posix())
    for index in (-1, 3):
        with pytest.raises(IndexError):
            shards.read(index)
