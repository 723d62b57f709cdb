"""What cannot be indexed is streamed: commands that print tars, broken ones, endless ones."""

import sys
import time
from collections import Counter

import pytest
from few_samples import Letters, assert_same, picture

from softmoe_clip.data_pipelines.config import DataConfig
from softmoe_clip.data_pipelines.ledger import read_ledger
from softmoe_clip.data_pipelines.pictures import RandomCrop
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.stream import STATEMENT, Stream, stream_batches
from softmoe_clip.data_pipelines.train_set import open_train
from softmoe_clip.data_pipelines.transforms import Augment

ENDLESS = """
import io, sys, tarfile
picture = open(sys.argv[1], "rb").read()
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
    for number in range(10**9):
        for name, data in ((f"{number}.jpg", picture), (f"{number}.txt", b"endless")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve samples in four shards, one of them bad."""
    out = tmp_path_factory.mktemp("stream") / "shards"
    with ShardWriter(out, shard_size=3) as writer:
        for number in range(12):
            writer.add(b"bad" if number == 7 else picture(number), "jpg", [f"{number}a", f"{number}b"])
    return out


def stream(folder, pattern="pipe:cat {}/0000{{0..3}}.tar"):
    return open_train(DataConfig(train=pattern.format(folder)))


def batches(shards, **changes):
    options = {"picture": RandomCrop(16, Augment(flip=True)), "batch_size": 4, "seed": 5, "num_batches": 12}
    return list(stream_batches(shards, Letters(), **{**options, **changes}))


def test_commands_and_files_are_streamed_when_one_is_a_command(folder):
    commands = stream(folder)
    assert commands == Stream(tuple(f"pipe:cat {folder}/0000{number}.tar" for number in range(4)))
    assert stream(folder, "pipe:cat {0}/00000.tar::{0}/00001.tar").urls[1] == f"{folder}/00001.tar"
    assert commands.fingerprint() != stream(folder, "pipe:cat {}/00000.tar").fingerprint()


def test_batches_are_full_and_each_round_holds_each_good_sample(folder):
    found = batches(stream(folder), num_batches=11)
    assert [batch.positions for batch in found] == [list(range(4 * n, 4 * n + 4)) for n in range(11)]
    counts = Counter(key for batch in found for key in batch.keys)
    assert set(counts) == {f"{n // 3:05d}{n % 3:04d}" for n in range(12)} - {"000020001"}
    assert all(
        key not in counts or int(c[:-1]) == int(key[:5]) * 3 + int(key[5:])
        for b in found
        for key, c in zip(b.keys, b.captions, strict=True)
    )
    replaced = [entry for batch in found for entry in batch.replaced]
    assert {(entry.key, entry.reason) for entry in replaced} == {("000020001", "no picture in a known format")}


def test_the_same_processes_and_workers_give_the_same_batches(folder):
    first = batches(stream(folder), num_batches=6)
    assert_same(first, batches(stream(folder), num_batches=6))
    two = {"num_batches": 3, "num_workers": 2}
    assert_same(batches(stream(folder), **two), batches(stream(folder), **two))
    for change in ({"seed": 6}, {"start": 24}):
        assert [b.keys for b in first] != [b.keys for b in batches(stream(folder), num_batches=6, **change)]


def test_ranks_and_workers_read_streams_of_their_own(folder):
    keys = []
    for rank in range(2):
        part = batches(stream(folder), rank=rank, world_size=2, num_workers=2, num_batches=4)
        assert [batch.positions for batch in part] == [[4 * n + 2 * rank, 4 * n + 2 * rank + 1] for n in range(4)]
        keys.append({key for batch in part for key in batch.keys})
    assert keys[0]
    assert keys[1]


def test_fewer_streams_than_processes_are_refused(folder):
    with pytest.raises(ValueError, match=r"1 stream\(s\) cannot be shared by 2 processes"):
        batches(stream(folder, "pipe:cat {}/00000.tar"), world_size=2)
    with pytest.raises(ValueError, match=r"shuffle_captions .* cannot be used with a stream"):
        batches(stream(folder), shuffle_captions=True)
    with pytest.raises(ValueError, match="cannot be one of several sources"):
        open_train(DataConfig(train=[{"shards": "pipe:cat a.tar"}, {"shards": "b"}]))


def test_a_stream_that_breaks_off_is_said_and_the_others_go_on(folder, capsys):
    cut = f"pipe:head -c 9000 {folder}/00000.tar"
    found = batches(Stream((cut, f"pipe:cat {folder}/00001.tar", "pipe:exit 3")))
    assert {key[:5] for batch in found for key in batch.keys} >= {"00001"}
    assert "a stream broke off (" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("command", ["pipe:cat /nowhere/0.tar 2>/dev/null", "pipe:true", "pipe:echo no tar"])
def test_streams_without_samples_are_one_sentence(command, num_workers):
    with pytest.raises(ValueError, match=r"no sample came out of pipe:.* \(.*\): try it in a shell") as caught:
        batches(Stream((command,)), num_workers=num_workers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_endless_stream_is_read_as_far_as_it_is_needed(tmp_path, num_workers):
    (tmp_path / "picture.jpg").write_bytes(picture(1))
    (tmp_path / "endless.py").write_text(ENDLESS)
    endless = Stream((f"pipe:exec {sys.executable} -S {tmp_path}/endless.py {tmp_path}/picture.jpg 2>/dev/null",))
    begin = time.monotonic()
    found = batches(endless, num_batches=3, num_workers=num_workers)
    assert time.monotonic() - begin < 20
    keys = [key for batch in found for key in batch.keys]
    assert len(set(keys)) == len(keys) == 12
    assert {caption for batch in found for caption in batch.captions} == {"endless"}


def test_a_run_trains_on_a_stream_and_says_once_what_resume_means(tiny_config, scenes, tmp_path, capsys):
    from softmoe_clip.training.loop import train

    settings = (f"data.train='pipe:cat {scenes}/train/00000.tar'", "log_every=2")
    run = train(tiny_config(*settings, "steps=2"))
    assert capsys.readouterr().err.count(STATEMENT) == 1
    train(tiny_config(*settings, "steps=4"))
    told = capsys.readouterr().err
    assert told.count(STATEMENT) == 1
    assert "going on after step 2 of 4" in told
    assert (run / "model").is_dir()
    assert read_ledger(run / "skipped.jsonl") == []


def test_a_stream_of_nothing_but_bad_samples_ends_with_a_reason(tmp_path):
    with ShardWriter(tmp_path / "out") as writer:
        for _ in range(20):
            writer.add(b"bad", "jpg", ["a caption"])
    with pytest.raises(ValueError, match="nearly all samples are bad"):
        batches(stream(tmp_path / "out", "pipe:cat {}/00000.tar"))
