"""Copies of remote files: fetched once by any number of processes, never more than the limit, never lost while read."""

import errno
import os
import random
import subprocess
import sys
import time

import pytest
from bad_server import bad_server

from softmoe_clip.data_pipelines import fetch
from softmoe_clip.data_pipelines.shard_cache import ShardCache, release

SIZE = 100_000
GIB = 3.5 * SIZE / 2**30  # room for three of the files


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fetch, "TIMEOUT", 1)
    (tmp_path / "served").mkdir()
    for number in range(6):
        (tmp_path / "served" / f"{number}.tar").write_bytes(random.Random(number).randbytes(SIZE))
    with bad_server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", GIB)


def use(cache, url):
    release(cache.open(url))


def held(cache):
    return sorted(path.name for path in cache.folder.glob("*/*") if not path.name.startswith("."))


def test_a_copy_is_fetched_once_and_read_from_there(server, cache):
    for _ in range(3):
        descriptor = cache.open(f"{server.url}/0.tar")
        assert os.pread(descriptor, 2 * SIZE, 0) == random.Random(0).randbytes(SIZE)
        release(descriptor)
    assert server.requests == {"0.tar": 1}


def test_the_least_recently_used_go_when_there_is_no_room(server, cache):
    for number in (0, 1, 2, 0, 3):
        use(cache, f"{server.url}/{number}.tar")
        time.sleep(0.01)
    assert held(cache) == ["0.tar", "2.tar", "3.tar"]
    assert sum(path.stat().st_size for path in cache.folder.rglob("*")) < GIB * 2**30 + 10_000


def test_files_of_the_user_in_the_same_folder_stay(server, cache):
    mine = cache.folder / "mine/photo.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"0" * cache.limit)
    (cache.folder / "mine/folder").mkdir()
    for number in range(3):
        use(cache, f"{server.url}/{number}.tar")
    assert mine.stat().st_size == cache.limit


def test_a_copy_that_is_read_stays_and_is_not_lost(server, cache):
    descriptors = [cache.open(f"{server.url}/{number}.tar") for number in range(3)]
    use(cache, f"{server.url}/3.tar")
    assert held(cache) == ["0.tar", "1.tar", "2.tar", "3.tar"], "the limit gives way to what is in use"
    release(descriptors[1])
    use(cache, f"{server.url}/4.tar")
    assert not {"1.tar", "3.tar"} & set(held(cache))
    for number in (0, 2):
        cache.place(f"{server.url}/{number}.tar").unlink()  # even so, it can be read to its end
        assert os.pread(descriptors[number], SIZE, 0) == random.Random(number).randbytes(SIZE)
        release(descriptors[number])


def test_half_a_file_never_takes_the_name_of_a_whole_one(server, cache):
    server.faults["0.tar"] = ["half"] * 5
    with pytest.raises(ValueError, match=r"0\.tar could not be fetched"):
        cache.open(f"{server.url}/0.tar")
    assert held(cache) == []
    use(cache, f"{server.url}/0.tar")
    assert held(cache) == ["0.tar"]


def test_what_a_killed_process_left_is_removed_when_room_is_needed(server, cache):
    use(cache, f"{server.url}/0.tar")
    part = cache.place(f"{server.url}/5.tar.part")
    part.write_bytes(bytes(3 * SIZE))
    os.utime(part, (0, 0))
    cache.place(f"{server.url}/.5.tar.lock").touch()
    use(cache, f"{server.url}/1.tar")
    assert held(cache) == ["0.tar", "1.tar"]


def test_a_file_larger_than_the_whole_cache_is_one_sentence(server, tmp_path):
    with pytest.raises(ValueError, match=r"0\.tar has 0.00 GiB, more than the whole cache .*: raise data.cache_gib"):
        ShardCache(tmp_path / "cache", 1e-6).open(f"{server.url}/0.tar")

    assert server.requests["0.tar"] == 1


def test_a_full_disk_is_told_with_the_file_and_not_tried_again(server, cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*0\.tar\.part"):
        cache.open(f"{server.url}/0.tar")
    assert server.requests["0.tar"] == 1
    assert held(cache) == []


def test_files_of_one_name_in_two_places_are_two(cache):
    urls = [
        "http://a/x/0.tar",
        "http://a/y/0.tar",
        "http://b/x/0.tar",
        "http://a/x/0.tar?token=1",
        "http://a/x/..%2F0.tar",
    ]
    places = [cache.place(url) for url in urls]
    assert len(set(places)) == 5
    assert all(place.parent.parent == cache.folder for place in places)


HAMMER = """
import random, sys
from softmoe_clip.data_pipelines.shard_cache import ShardCache, release
import os
url, folder, gib, seed = sys.argv[1:]
cache, draws = ShardCache(folder, float(gib)), random.Random(int(seed))
for _ in range(40):
    number = draws.randrange(6)
    descriptor = cache.open(f"{url}/{number}.tar")
    assert os.pread(descriptor, 10**6, 0) == random.Random(number).randbytes(100_000)
    release(descriptor)
"""


def test_several_processes_share_a_cache_that_is_too_small_for_them(server, cache):
    server.faults = {f"{number}.tar": ["half"] for number in range(6)}
    command = [sys.executable, "-c", HAMMER, server.url, str(cache.folder), str(GIB)]
    children = [subprocess.Popen([*command, str(seed)]) for seed in range(3)]
    assert [child.wait(timeout=60) for child in children] == [0, 0, 0]
    assert not list(cache.folder.rglob("*.part"))
    # While all copies were in use the limit gave way; who comes next, alone, finds or makes room.
    for number in range(6):
        use(cache, f"{server.url}/{number}.tar")
    assert len(held(cache)) == 3
