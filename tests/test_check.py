"""check: each thing that is wrong is found once, with its place and reason, by any number of processes."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_shards import encoded, png, scene, whole, write_set
from tars import write_tar

from softmoe_clip.data_pipelines import sample_facts, tar_samples
from softmoe_clip.data_pipelines.check import check
from softmoe_clip.data_pipelines.findings import by_kind, print_findings, write_findings
from softmoe_clip.data_pipelines.ledger import read_ledger
from softmoe_clip.data_pipelines.processes import in_order


def found(report, *columns):
    return [tuple(finding[column] for column in columns) for finding in report.findings]


def test_good_shards_have_no_findings(tmp_path):
    report = check(write_set(tmp_path / "out", map(png, range(5)), shard_size=2))
    assert (report.num_samples, report.findings) == (5, [])
    assert [tuple(count) for count in report.counts] == [("00000.tar", 2, 2), ("00001.tar", 2, 2), ("00002.tar", 1, 1)]


def test_each_bad_sample_is_found_with_key_shard_and_reason(tmp_path):
    good = png(0)
    damaged = bytearray(good)
    damaged[-200] ^= 0xFF
    bomb = bytearray(good)
    bomb[16:24] = b"\0\0\x80\0" * 2  # says 32768 x 32768
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    samples = {
        "good": ([("png", good), ("txt", b"fine")], None, ""),
        "cut": ([("png", good[:500]), ("txt", b"a")], "bad picture", "truncated"),
        "flipped": ([("png", bytes(damaged)), ("txt", b"b")], "bad picture", "does not decode"),
        "text": ([("jpg", b"no picture"), ("txt", b"c")], "bad picture", "known format"),
        "zero": ([("jpg", b""), ("txt", b"d")], "bad picture", "0 bytes"),
        "bomb": ([("png", bytes(bomb)), ("txt", b"e")], "decompression bomb", "over the limit"),
        "silent": ([("png", good), ("txt", b" \n")], "bad caption", "no caption"),
        "mute": ([("png", good)], "bad caption", "no caption"),
        "blind": ([("txt", b"f")], "no picture", "no picture"),
        "latin": ([("png", good), ("txt", b"caf\xe9")], "bad caption", "not UTF-8"),
    }
    write_tar(
        tmp_path / "0.tar", [(f"{key}.{name}", data) for key, (parts, *_) in samples.items() for name, data in parts]
    )
    report = check(str(tmp_path))
    assert report.num_samples == len(samples)
    assert {(f["severity"], f["shard"]) for f in report.findings} == {("error", "0.tar")}
    expected = {key: kind for key, (_, kind, _) in samples.items() if kind}
    assert dict(found(report, "key", "kind")) == expected
    assert len(report.findings) == len(expected)
    for key, reason in found(report, "key", "reason"):
        assert samples[key][2] in reason
    assert report.counts[0].num_good == 1


def test_damage_of_whole_shards_wrong_counts_and_repeated_keys_are_found(tmp_path):
    write_tar(tmp_path / "0.tar", [member for seed, key in enumerate("abca") for member in whole(key, seed)])
    write_tar(tmp_path / "1.tar", [member for seed, key in enumerate("cde", 10) for member in whole(key, seed)])
    size = (tmp_path / "1.tar").read_bytes().rindex(b"e.txt")
    with open(tmp_path / "1.tar", "r+b") as file:
        file.truncate(size + 300)  # inside the header of e.txt
    (tmp_path / "2.tar").write_bytes(bytes(10240))
    (tmp_path / "3.tar").write_bytes(b"<html>404</html>")
    (tmp_path / "4.tar").write_bytes(b"")
    (tmp_path / "5.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 5, "9.tar": 5}))
    report = check(str(tmp_path))
    assert sorted(found(report, "shard", "kind", "key")) == [
        ("0.tar", "duplicate key", "a"),
        ("0.tar", "wrong count", ""),
        ("1.tar", "bad caption", "e"),
        ("1.tar", "broken tar", ""),
        ("1.tar", "repeated keys", ""),
        ("2.tar", "empty shard", ""),
        ("3.tar", "broken tar", ""),
        ("4.tar", "broken tar", ""),
        ("5.tar", "broken tar", ""),
        ("9.tar", "wrong count", ""),
    ]
    reasons = {shard: reason for shard, kind, reason in found(report, "shard", "kind", "reason") if "broken" in kind}
    for shard, text in ((1, "cut off"), (3, "is not a tar"), (4, "is empty"), (5, "is compressed")):
        assert text in reasons[f"{shard}.tar"]
    assert [finding["severity"] for finding in report.findings].count("warning") == 2


def test_a_sample_torn_between_two_shards_is_named_with_both(tmp_path):
    write_tar(tmp_path / "0.tar", [*whole("a", 0), ("b.png", png(1))])
    write_tar(tmp_path / "1.tar", [("b.txt", b"its caption"), *whole("c", 2)])
    report = check(str(tmp_path))
    assert ("split key", "1.tar", "b", "b in 0.tar") in found(report, "kind", "shard", "key", "other")
    assert report.num_errors == 2


def test_doubled_pictures_and_captions_are_found_different_ones_are_not(tmp_path):
    picture = scene(0)
    pictures = [
        png(0),
        png(1),
        png(0),
        encoded(picture.resize((60, 60))),
        encoded(picture.crop((1, 1, 95, 95))),
        png(2),
    ]
    captions = ["one", "two", "three", "four", "  TWO ", "six"]
    report = check(write_set(tmp_path / "out", pictures, captions, shard_size=3))
    assert report.num_errors == 0
    assert found(report, "kind", "shard", "key", "other") == [
        ("same picture", "00000.tar", "000000002", "000000000 in 00000.tar"),
        ("near picture", "00001.tar", "000010000", "000000000 in 00000.tar"),
        ("near picture", "00001.tar", "000010001", "000000000 in 00000.tar"),
        ("same caption", "00000.tar", "000000001", "000010001 in 00001.tar"),
    ]
    assert "'two' is a caption of 2 samples" in report.findings[-1]["reason"]


def test_leaks_between_two_sets_are_found_once_each(tmp_path):
    train = [png(0), png(1), encoded(scene(10).resize((50, 50))), png(3), png(11)]
    captions = ["a", "b", "c", "shared caption", "e"]
    train = write_set(tmp_path / "train", train, captions)
    val = write_set(tmp_path / "val", [png(10), png(11), png(12), png(13)], ["v", "w", "x", "Shared  caption"])
    report = check(train, against=val)
    assert found(report, "kind", "key", "other") == [
        ("leaked picture", "000000002", "000000000 in 00000.tar"),
        ("leaked pair", "000000003", "000000003 in 00000.tar"),
        ("leaked picture", "000000004", "000000001 in 00000.tar"),
    ]
    assert check(train).findings == []


def test_equal_keys_with_the_caption_of_a_class_are_no_leak(tmp_path):
    train = write_set(tmp_path / "train", [png(i) for i in range(4)], ["a cat", "a dog", "a cat", "a dog"])
    val = write_set(tmp_path / "val", [png(i) for i in range(10, 14)], ["a cat", "a dog", "a dog", "a dog"])
    assert "leaked pair" not in by_kind(check(train, against=val).findings)


def test_what_has_a_leaked_caption_alone_stays_in_clean_shards(tmp_path):
    train = write_set(tmp_path / "train", [png(0), png(1)], ["a", "b"])
    report = check(train, against=write_set(tmp_path / "val", [png(10), png(1)], ["a", "c"]))
    assert found(report, "kind", "key") == [("leaked pair", "000000000"), ("leaked picture", "000000001")]
    assert list(report.dropped) == [1]


def test_samples_with_a_label_alone_are_one_warning(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.cls", b"3"), ("b.png", png(2)), ("b.cls", b"4")])
    report = check(str(tmp_path))
    assert found(report, "severity", "kind", "key") == [("warning", "only a label", "a")]
    assert "2 samples" in report.findings[0]["reason"]


def test_too_few_shards_for_the_readers_is_a_warning(tmp_path):
    shards = write_set(tmp_path / "out", map(png, range(4)), shard_size=2)
    assert check(shards, num_processes=2).findings == []
    (warning,) = check(shards, num_processes=2, num_workers=2).findings
    assert (warning["kind"], warning["severity"]) == ("few shards", "warning")
    assert "need 4" in warning["reason"]
    with pytest.raises(ValueError, match="processes 0"):
        check(shards, num_processes=0)


def test_any_number_of_processes_finds_the_same_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "FEW_SHARDS", 0)
    monkeypatch.setattr(sample_facts, "FEW_SAMPLES", 0)
    monkeypatch.setattr(tar_samples, "CHUNK", 3)
    pictures = [png(seed % 9) if seed % 5 else png(seed)[:-30] for seed in range(25)]
    shards = write_set(tmp_path / "out", pictures, shard_size=10)
    (tmp_path / "out" / "9.tar").write_bytes(b"no tar")
    one, two = (check(shards, jobs=jobs) for jobs in (1, 2))
    assert len(one.findings) > 10
    assert one.findings == two.findings
    assert one.counts == two.counts
    for ours, theirs in zip(one.contents.facts, two.contents.facts, strict=True):
        np.testing.assert_equal(ours, theirs)


def test_a_reader_that_is_killed_is_one_sentence():
    with pytest.raises(ValueError, match="killed: this is most often too little memory"):
        list(in_order(os._exit, [3], num_processes=2))


def test_the_report_and_the_ledger_hold_every_finding_and_the_table_only_a_few(tmp_path, capsys):
    report = check(write_set(tmp_path / "out", [png(0)] * 30))
    ledger = write_findings(tmp_path / "report" / "check.json", report.summary(), report.findings)
    written = json.loads((tmp_path / "report" / "check.json").read_text())
    assert written["findings"] == report.findings == read_ledger(ledger)
    assert written["kinds"] == [{"severity": "warning", "kind": "same picture", "count": 29}]
    assert written["num_good"] == 30
    print_findings(report.findings)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "29" in lines[1]
    assert "26 more" in lines[-1]
    with pytest.raises(ValueError, match=r"\.json"):
        write_findings(tmp_path / "check.jsonl", {}, [])


def test_names_of_any_bytes_are_listed_and_steer_no_terminal(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", [("\udcff\x1b[31m\n.png", b"no picture"), ("\udcff\x1b[31m\n.txt", b"a caption")])
    report = check(str(tmp_path))
    (bad,) = report.findings
    assert bad["key"] == "?\x1b[31m\n"
    write_findings(tmp_path / "check.json", {}, report.findings)
    print_findings(report.findings)
    assert "??[31m? in 0.tar: no picture" in capsys.readouterr().out


def test_findings_are_grouped_errors_first(tmp_path):
    write_tar(tmp_path / "0.tar", [*whole("a", 0), *whole("b", 0), ("c.png", png(1))])
    assert list(by_kind(check(str(tmp_path)).findings)) == ["bad caption", "same picture", "same caption"]


def test_no_shards_is_an_error_that_names_them(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not there"):
        check(str(tmp_path / "nowhere"))


def test_check_writes_a_report_a_ledger_and_clean_shards(softmoe_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_set("shards", [png(0), png(1), png(0), b"no picture", png(2)])
    write_set("val", [png(2)], ["another caption"])
    done = softmoe_clip("check", "shards", "--against", "val", "--out", "r/check.json", "--fix", "clean", "--jobs", "1")
    assert done.returncode == 1
    assert "5 samples, 3 findings: 1 errors, 2 warnings" in done.stdout
    assert "2 samples in clean, 2 left out, 1 joined" in done.stdout
    report = json.loads((tmp_path / "r/check.json").read_text())
    ledger = [json.loads(line) for line in (tmp_path / "r/check.jsonl").read_text().splitlines()]
    assert report["findings"] == ledger
    assert [finding["kind"] for finding in ledger] == ["bad picture", "same picture", "leaked picture"]

    assert softmoe_clip("check", "clean", "--against", "val").returncode == 0
    warned = softmoe_clip("check", "clean", "--processes", "2", "--strict")
    assert warned.returncode == 1
    assert "few shards" in warned.stdout
    assert softmoe_clip("check", "clean", "--processes", "2").returncode == 0
    for mistake in (["--fix", "val"], ["--out", "check.txt"], ["--jobs", "0"], ["--against", "nowhere"]):
        done = softmoe_clip("check", "shards", *mistake)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), mistake


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts processes in /proc")
def test_processes_end_when_their_parent_is_killed(tmp_path):
    shards = write_set(tmp_path / "out", map(png, range(3)))
    program = f"""
import os, signal
from softmoe_clip.data_pipelines.processes import in_order
from softmoe_clip.data_pipelines.shards import find_shards
from softmoe_clip.data_pipelines.tar_samples import index_or_reason
if __name__ == "__main__":
    urls = [shard.url for shard in find_shards({shards!r})]
    results = in_order(index_or_reason, urls * 1000, 2)
    next(results)
    import multiprocessing
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, env=environment, timeout=60
    )
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) == 2
    # The pipes of stdout and stderr close only when nobody is left who could write to them, and `run` waited for that.
    assert not any((Path("/proc") / str(pid) / "exe").exists() for pid in children)
