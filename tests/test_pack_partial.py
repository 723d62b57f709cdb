"""A pack that was stopped continues, and ends with the bytes of one that was not."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from test_pack import all_files, make_source

from softmoe_clip.data_pipelines.pack import pack
from softmoe_clip.data_pipelines.picture_bytes import Encoding
from softmoe_clip.data_pipelines.shard_files import ShardFiles


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A source of 20 pictures of which two shards of five were packed before Ctrl-C, into out.partial."""
    source = make_source(tmp_path / "source", 20)
    (source / "3.png").write_bytes(b"no picture")
    calls, add = iter(range(100)), ShardFiles.add

    def until_the_third_shard(self, *arguments):
        if next(calls) == 12:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardFiles, "add", until_the_third_shard)
        with pytest.raises(KeyboardInterrupt):
            pack(source, tmp_path / "out", "train", shard_size=5)
    pack(source, tmp_path / "whole", "train", shard_size=5)
    return source


def test_ctrl_c_keeps_finished_shards_and_says_how_to_continue(interrupted, tmp_path, capsys):
    assert sorted(os.listdir(tmp_path)) == ["out.partial", "source", "whole"]
    tar = tmp_path / "out.partial" / "shards" / "00000.tar"
    written = tar.stat().st_mtime_ns
    report = pack(interrupted, tmp_path / "out", "train", shard_size=5)
    assert "continuing with the 2 finished shards" in capsys.readouterr().err
    assert (tmp_path / "out" / "00000.tar").stat().st_mtime_ns == written
    assert all_files(tmp_path / "out") == all_files(tmp_path / "whole")
    assert (report.counts, [entry["name"] for entry in report.skipped]) == ({"train": 19}, ["3.png"])
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "whole"]


@pytest.mark.parametrize("name", ["00000.tar", "00001.parquet", "00000_stats.json"])
def test_a_finished_shard_that_was_damaged_since_is_written_again(interrupted, tmp_path, name):
    path = tmp_path / "out.partial" / "shards" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    pack(interrupted, tmp_path / "out", "train", shard_size=5)
    assert all_files(tmp_path / "out") == all_files(tmp_path / "whole")


def test_other_options_and_a_changed_source_are_refused_with_the_difference(interrupted, tmp_path):
    before = all_files(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=r"out\.partial holds an unfinished pack with shard_size 5, now 6"):
        pack(interrupted, tmp_path / "out", "train", shard_size=6)
    with pytest.raises(ValueError, match=r"with quality None, now 50: give the same .* or remove that folder"):
        pack(interrupted, tmp_path / "out", "train", shard_size=5, encoding=Encoding(quality=50))
    text = (interrupted / "7.txt").read_text()
    (interrupted / "7.txt").write_text("another caption")
    with pytest.raises(ValueError, match="but files, times or captions of some have changed since"):
        pack(interrupted, tmp_path / "out", "train", shard_size=5)
    (interrupted / "7.txt").write_text(text)
    os.utime(interrupted / "8.png", (1, 1))
    with pytest.raises(ValueError, match="but files, times or captions of some have changed since"):
        pack(interrupted, tmp_path / "out", "train", shard_size=5)
    (interrupted / "8.png").unlink()
    (interrupted / "8.txt").unlink()
    with pytest.raises(ValueError, match="with number of pictures 20, now 19"):
        pack(interrupted, tmp_path / "out", "train", shard_size=5)
    assert all_files(tmp_path / "out.partial") == before


def test_a_folder_of_something_else_under_the_partial_name_is_left_alone(tmp_path):
    source = make_source(tmp_path / "source", 3)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.partial holds something else \(thesis\.txt\)"):
        pack(source, tmp_path / "out", "train")
    assert all_files(tmp_path / "out.partial") == {"thesis.txt": b"mine"}


def large_source(folder, num_pictures):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(num_pictures):
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), np.uint8)).save(folder / f"{number}.png", compress_level=0)
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return folder


def start(source, out):
    command = [sys.executable, "-m", "softmoe_clip", "pack", source, out, "--shard-size", "25", "--workers", "2"]
    return subprocess.Popen(
        [*map(str, command), "--encode", "webp"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )


def hear_interrupts():
    """What a shell starts in the background ignores Ctrl-C, and so do all processes that come of it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(out):
    return sorted(out.with_name("out.partial").glob("finished/*.json"))


def wait_for_the_last_of(group):
    """Return once no process of the group lives, which must be soon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("a worker lives on")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_pack_continues_and_ends_with_the_same_bytes(tmp_path, number):
    source, out = large_source(tmp_path / "source", 700), tmp_path / "out"
    process = start(source, out)
    while len(finished(out)) < 4:
        time.sleep(0.002)
        assert process.poll() is None
    process.send_signal(number)  # to the parent alone
    process.communicate()
    assert process.returncode != 0
    wait_for_the_last_of(process.pid)
    kept = {path.name: path.stat().st_mtime_ns for path in finished(out)}
    assert 4 <= len(kept) < 28
    assert not out.exists()
    again = start(source, out)
    error = again.communicate()[1]
    assert again.returncode == 0, error
    assert int(re.search(r"continuing with the (\d+) finished", error)[1]) == len(kept)
    pack(source, tmp_path / "whole", shard_size=25, encoding=Encoding("webp"), num_workers=1)
    assert all_files(out) == all_files(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "whole"]


@pytest.mark.slow
def test_a_pack_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    source, out = large_source(tmp_path / "source", 700), tmp_path / "out"
    for _ in range(4):
        before, process = len(finished(out)), start(source, out)
        while len(finished(out)) <= before and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
    if not out.exists():
        process = start(source, out)
        assert "continuing" in process.communicate()[1]
    pack(source, tmp_path / "whole", shard_size=25, encoding=Encoding("webp"), num_workers=1)
    assert all_files(out) == all_files(tmp_path / "whole")


def test_two_packs_into_one_folder_are_told_apart(tmp_path):
    from softmoe_clip.data_pipelines.new_folder import lock_folder

    source = make_source(tmp_path / "source", 3)
    (tmp_path / "out.partial").mkdir()
    lock = lock_folder(tmp_path / "out.partial", tmp_path / "out")
    with pytest.raises(ValueError, match="another process is writing"):
        pack(source, tmp_path / "out", "train")
    os.close(lock)
