"""Files come whole or not at all, from servers that are slow, cut connections, send halves or nothing."""

import random
import threading
import time

import fsspec
import pytest
from bad_server import bad_server

from softmoe_clip.data_pipelines import fetch as module
from softmoe_clip.data_pipelines.fetch import Missing, Stopped, fetch, read_url, size_of

CONTENT = random.Random(0).randbytes(50_000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "a b.tar").write_bytes(CONTENT)
    with bad_server(tmp_path / "served") as server:
        yield server


@pytest.mark.parametrize(
    "faults",
    [
        [],
        ["half"],
        ["stall", "half"],
        ["hang up", "503", "half", "429"],
        ["no length"],
    ],
)
def test_a_file_comes_whole_whatever_went_wrong_before(server, tmp_path, faults):
    server.faults["a b.tar"] = list(faults)
    rooms = []
    fetch(f"{server.url}/a%20b.tar", tmp_path / "here", rooms.append)
    assert (tmp_path / "here").read_bytes() == CONTENT
    assert server.requests["a b.tar"] == 1 + len(set(faults) - {"no length"})
    assert rooms[-1] == (0 if "no length" in faults else len(CONTENT))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("half", r"the connection was cut after 25,000 of 50,000 bytes"),
        ("stall", "timed out"),
        ("hang up", "Remote end closed connection"),
        ("500", "the server answered 500"),
    ],
)
def test_after_some_tries_one_sentence_names_the_url_and_nothing_is_left(server, tmp_path, fault, reason):
    server.faults["a b.tar"] = [fault] * 9
    with pytest.raises(ValueError, match=rf"a%20b\.tar could not be fetched in 5 tries \({reason}.*check the net") as e:
        fetch(f"{server.url}/a%20b.tar", tmp_path / "here")
    assert "\n" not in str(e.value)
    assert server.requests["a b.tar"] == 5
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("answer", ["403", "404", "410"])
def test_what_is_not_there_is_not_asked_for_again(server, tmp_path, answer):
    server.faults["a b.tar"] = [answer]
    with pytest.raises(Missing, match=rf"{server.url}/a%20b\.tar is not to be had \({answer} .*check the address"):
        fetch(f"{server.url}/a%20b.tar", tmp_path / "here")
    assert server.requests["a b.tar"] == 1
    with pytest.raises(Missing, match="404"):
        read_url(f"{server.url}/other.tar")


def test_a_server_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/x.tar could not be fetched in 5 tries \(.*refused"):
        fetch("http://127.0.0.1:9/x.tar", tmp_path / "here")


def test_a_slow_server_is_waited_for_and_a_far_too_slow_one_is_not(server, tmp_path, monkeypatch):
    server.pause = 0.03
    fetch(f"{server.url}/a%20b.tar", tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == CONTENT
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    monkeypatch.setattr(module, "SLOWEST", 10**9)
    with pytest.raises(ValueError, match="fewer than 1,000,000,000 bytes per second"):
        fetch(f"{server.url}/a%20b.tar", tmp_path / "here")


def test_nobody_waits_for_what_is_no_longer_wanted(server, tmp_path):
    stopped = threading.Event()
    server.pause = 0.05
    threading.Timer(0.1, stopped.set).start()
    begin = time.monotonic()
    with pytest.raises(Stopped):
        fetch(f"{server.url}/a%20b.tar", tmp_path / "here", stopped=stopped)
    assert time.monotonic() - begin < 0.5
    assert not (tmp_path / "here").exists()


def test_other_kinds_of_storage_come_through_fsspec(tmp_path):
    fsspec.filesystem("memory").pipe("/bucket/a.tar", CONTENT)
    fetch("memory://bucket/a.tar", tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == read_url("memory://bucket/a.tar") == CONTENT
    assert size_of("memory://bucket/a.tar") == len(CONTENT)
    with pytest.raises(Missing, match=r"memory://bucket/b.tar is not to be had"):
        fetch("memory://bucket/b.tar", tmp_path / "there")
    with pytest.raises(Missing, match=r"warp://bucket/b.tar is no URL that can be read"):
        fetch("warp://bucket/b.tar", tmp_path / "there")


def test_a_kind_of_storage_whose_package_is_missing_is_named(tmp_path):
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"s3://bucket/a.tar needs a package that is not installed: .*s3fs"):
            fetch("s3://bucket/a.tar", tmp_path / "here")
