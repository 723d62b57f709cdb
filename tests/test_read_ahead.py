"""The system is told of each byte of the next window once, before its time."""

import os
import threading

import pytest

from softmoe_clip.data_pipelines import read_ahead
from softmoe_clip.data_pipelines.mixture import Mixture
from softmoe_clip.data_pipelines.read_ahead import ReadAhead, spans
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import ShardSet


@pytest.fixture
def shards(tmp_path):
    """30 samples in ten shards."""
    with ShardWriter(tmp_path / "s", shard_size=3) as writer:
        for number in range(30):
            writer.add(bytes(10_000 + 999 * number), "jpg", ["x"])
    return ShardSet.open(str(tmp_path / "s"))


def asked(ahead):
    """All spans that wait for the thread."""
    found = []
    while not ahead.wanted.empty():
        found.append(ahead.wanted.get())
    return found


def test_spans_cut_bytes_at_the_files_ends():
    files = [("a", 10), ("b", 0), ("c", 5)]
    assert spans(files, 0, 15) == [("a", 0, 10), ("c", 0, 5)]
    assert spans(files, 3, 12) == [("a", 3, 10), ("c", 0, 2)]
    assert spans(files, 10, 10) == []


def test_each_window_is_asked_for_once_and_before_it_begins(shards):
    order = Mixture.of(0, shards.counts, shards.sources, 3)
    ahead = ReadAhead(shards, order, start=0, batch_size=2)
    known = dict.fromkeys(shards.urls, 0)
    for number in range(10):  # up to the last window of the pass: the next pass meets the shards again
        ahead(number)
        for url, start, end in asked(ahead):
            assert start == known[url], "no byte is asked for twice, and none is left out"
            known[url] = end
        [(current, following, share)] = order.windows_at(2 * number)
        assert all(known[shards.urls[shard]] == os.path.getsize(shards.urls[shard]) for shard in current)
        told = sum(known[shards.urls[shard]] for shard in following)
        assert told == int(share * sum(os.path.getsize(shards.urls[shard]) for shard in following))


def test_the_thread_asks_the_system_and_ends_with_the_iteration(shards, monkeypatch):
    advised, calls = [], threading.Semaphore(0)

    def posix_fadvise(descriptor, offset, size, advice):
        advised.append((os.fstat(descriptor).st_ino, offset, size, advice))
        calls.release()

    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    monkeypatch.setattr(read_ahead, "STEP", 10_000)
    with ReadAhead(shards, Mixture.of(0, shards.counts, shards.sources, 3), 0, 2) as ahead:
        ahead(0)
        assert calls.acquire(timeout=5)
        while calls.acquire(timeout=0.2):
            pass
    sizes = {os.stat(url).st_ino: os.path.getsize(url) for url in shards.urls}
    window = ahead.order.windows_at(0)[0].shards
    assert {file for file, *_ in advised} == {os.stat(shards.urls[shard]).st_ino for shard in window}
    for file in {file for file, *_ in advised}:
        assert sum(size for found, _, size, _ in advised if found == file) == sizes[file]
    assert {advice for *_, advice in advised} == {os.POSIX_FADV_WILLNEED}


def test_sets_of_one_window_or_larger_than_memory_are_left_to_the_system(shards, monkeypatch):
    assert not ReadAhead(shards, Mixture.of(0, shards.counts, shards.sources, 10), 0, 2).advises
    assert ReadAhead(shards, Mixture.of(0, shards.counts, shards.sources, 3), 0, 2).advises
    monkeypatch.setattr(read_ahead, "memory", lambda: 1000)
    assert not ReadAhead(shards, Mixture.of(0, shards.counts, shards.sources, 3), 0, 2).advises
