"""Remote shards: opened without being fetched where something lies beside them, read as local ones are."""

import shutil
import threading
import time

import pytest
from bad_server import bad_server
from few_samples import Letters, assert_same
from PIL import Image

from softmoe_clip.data_pipelines import fetch
from softmoe_clip.data_pipelines.config import DataConfig
from softmoe_clip.data_pipelines.loader import train_batches
from softmoe_clip.data_pipelines.pictures import RandomCrop
from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.shard_cache import ShardCache
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import INDEX_NAME, ShardSet
from softmoe_clip.data_pipelines.train_set import open_train
from softmoe_clip.data_pipelines.transforms import Augment

NUM_SHARDS, GIB = 8, 5.5 * 10_240 / 2**30  # each tar has one record of 10 KiB: five of them


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Eight shards of two pictures; the cache has room for five."""
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(fetch, "TIMEOUT", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ShardWriter(tmp_path / "served", shard_size=2) as writer:
        for number in range(2 * NUM_SHARDS):
            Image.new("RGB", (20, 20), (number * 15, 99, 0)).save(tmp_path / "picture.png")
            writer.add((tmp_path / "picture.png").read_bytes(), "png", [f"{number}a", f"{number}b"])
    with bad_server(tmp_path / "served") as server:
        yield server


def pattern(server):
    return f"{server.url}/{{00000..{NUM_SHARDS - 1:05d}}}.tar"


def tars_fetched(server):
    return sum(count for name, count in server.requests.items() if name.endswith(".tar"))


def test_with_an_index_beside_them_shards_are_fetched_when_they_are_read(server):
    remote, local = ShardSet.open(pattern(server)), ShardSet.open(str(server.folder))
    assert tars_fetched(server) == 0
    assert remote.fingerprint() == local.fingerprint()
    for index in (3, 2, 15):
        assert remote.read(index) == local.read(index)
    assert tars_fetched(server) == 2
    again = ShardSet.open(pattern(server))
    assert again.read(3) == local.read(3)
    assert tars_fetched(server) == 2


def test_with_counts_beside_them_each_is_indexed_when_it_is_first_read(server):
    local = ShardSet.open(str(server.folder))
    (server.folder / INDEX_NAME).unlink()
    remote = ShardSet.open(pattern(server))
    fingerprint = remote.fingerprint()
    assert (tars_fetched(server), remote.counts) == (0, local.counts)
    assert remote.read(6) == local.read(6)
    assert ShardSet.open(pattern(server)).fingerprint() == remote.fingerprint() == fingerprint
    assert tars_fetched(server) == 1
    assert remote.keys == local.keys


@pytest.mark.parametrize("page", [None, "\n<!DOCTYPE html><p>No such file"])
def test_without_any_of_these_they_are_counted_once(server, tmp_path, page):
    """Also where the server answers with a page for files that it has not."""
    local = ShardSet.open(str(server.folder))
    for file in server.folder.iterdir():
        if file.suffix != ".tar":
            file.unlink()
    if page is not None:
        for name in ("sizes.json", INDEX_NAME, "00000_stats.json"):
            (server.folder / name).write_text(page)
    for _ in range(2):
        remote = ShardSet.open(pattern(server))
        assert remote.counts == local.counts
        assert tars_fetched(server) == NUM_SHARDS
    assert remote.fingerprint() == local.fingerprint()


def test_a_count_that_promises_too_much_makes_bad_samples_and_no_crash(server):
    (server.folder / INDEX_NAME).unlink()
    sizes = (server.folder / "sizes.json").read_text()
    (server.folder / "sizes.json").write_text(sizes.replace('"00001.tar": 2', '"00001.tar": 3'))
    remote = ShardSet.open(pattern(server))
    assert len(remote) == 2 * NUM_SHARDS + 1
    with pytest.raises(Exception, match=r"sample 2 \(there are 2\) in 00001.tar: no picture"):
        read_pair(remote.read(4))
    assert remote.read(5).key == "000020000"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_are_those_of_local_shards_whatever_the_server_does(server, tmp_path, num_workers):
    options = {"picture": RandomCrop(8, Augment(flip=True)), "batch_size": 4, "seed": 3, "num_batches": 12, "window": 2}
    expected = list(train_batches(ShardSet.open(str(server.folder)), Letters(), **options))
    server.pause = 0.002
    server.faults = {f"{number:05d}.tar": ["half", "hang up", "503"][number % 3 :] for number in range(NUM_SHARDS)}
    cache = ShardCache(tmp_path / "copies", GIB)
    found = list(train_batches(ShardSet.open(pattern(server), cache), Letters(), num_workers=num_workers, **options))
    assert_same(found, expected)
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(30)
    # While all copies are in use the limit gives way to a reader that must go on; the next copy brings it back.
    cache.make_room(0, f"{server.url}/one_more.tar")
    held = [path for path in cache.folder.rglob("*.tar") if path.stat().st_size]
    assert len(held) <= 5 < NUM_SHARDS
    assert tars_fetched(server) > NUM_SHARDS, "some had to go, and came again"


def test_the_next_window_is_fetched_before_it_is_needed(server, tmp_path):
    options = {"picture": RandomCrop(8, Augment()), "batch_size": 4, "seed": 3, "num_batches": 4, "window": 2}
    cache = ShardCache(tmp_path / "copies", GIB)
    batches = train_batches(ShardSet.open(pattern(server), cache), Letters(), **options)
    next(batches)
    for _ in range(200):
        if len(list(cache.folder.rglob("*.tar"))) == 4:
            break
        time.sleep(0.01)
    assert len(list(cache.folder.rglob("*.tar"))) == 4, "this window of two, and the next"
    batches.close()


def test_a_shard_that_is_not_there_ends_training_with_its_address(server, tmp_path):
    (server.folder / "00004.tar").unlink()
    shards = ShardSet.open(pattern(server), ShardCache(tmp_path / "copies", GIB))
    options = {"picture": RandomCrop(8, Augment()), "batch_size": 16, "seed": 3, "num_batches": 1, "num_workers": 1}
    with pytest.raises(ValueError, match=rf"{server.url}/00004.tar is not to be had \(404 .*\): check the address"):
        list(train_batches(shards, Letters(), **options))


def test_a_cache_without_room_for_two_windows_is_refused_at_once(server, tmp_path):
    settings = {"train": pattern(server), "cache": str(tmp_path / "copies"), "cache_gib": GIB}
    assert len(open_train(DataConfig(**settings, window=2))) == 2 * NUM_SHARDS
    with pytest.raises(ValueError, match=r"need about .* GiB, but data.cache_gib is .*: raise it, or lower"):
        open_train(DataConfig(**settings, window=3))
    assert tars_fetched(server) == 0


def test_a_changed_shard_says_what_to_delete(server, tmp_path):
    cache = ShardCache(tmp_path / "copies", GIB)
    shards = ShardSet.open(pattern(server), cache)
    shutil.copy(server.folder / "00003.tar", server.folder / "00004.tar")
    shards.read(6)
    with pytest.raises(ValueError, match=rf"00004.tar has changed since it was indexed: delete {cache.folder}"):
        shards.read(8)
