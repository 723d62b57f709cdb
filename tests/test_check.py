import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from softmoe_clip.data_pipelines.check import check
from softmoe_clip.data_pipelines.shard_writer import ShardWriter


def png():
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_good_shards_have_no_findings(tmp_path):
    with ShardWriter(tmp_path / "out", shard_size=2) as writer:
        for number in range(5):
            writer.add(png(), "png", [f"caption {number}"])
    report = check(str(tmp_path / "out"))
    assert (report.num_samples, report.findings) == (5, [])
    assert [tuple(count) for count in report.counts] == [("00000.tar", 2, 2), ("00001.tar", 2, 2), ("00002.tar", 1, 1)]


def test_each_bad_sample_is_found_with_key_shard_and_reason(tmp_path):
    good = png()
    damaged = bytearray(good)
    damaged[-200] ^= 0xFF
    samples = {
        "good": [("png", good), ("txt", b"fine")],
        "cut": [("png", good[:500]), ("txt", b"fine")],
        "flipped": [("png", bytes(damaged)), ("txt", b"fine")],
        "text": [("jpg", b"no picture"), ("txt", b"fine")],
        "silent": [("png", good), ("txt", b" \n")],
        "blind": [("txt", b"fine")],
        "latin": [("png", good), ("txt", b"caf\xe9")],
    }
    write(tmp_path / "0.tar", [(f"{key}.{name}", data) for key, parts in samples.items() for name, data in parts])
    report = check(str(tmp_path))
    assert report.num_samples == 7
    assert {finding["key"] for finding in report.findings} == samples.keys() - {"good"}
    assert {(finding["severity"], finding["shard"]) for finding in report.findings} == {("error", "0.tar")}
    reasons = {finding["key"]: finding["reason"] for finding in report.findings}
    assert "truncated" in reasons["cut"]
    assert "no caption" in reasons["silent"]
    assert report.counts[0].num_good == 1


def test_damage_of_whole_shards_wrong_counts_and_repeated_keys_are_found(tmp_path):
    members = [(f"{key}.{name}", data) for key in "abca" for name, data in (("png", png()), ("txt", b"x"))]
    write(tmp_path / "0.tar", members)
    write(tmp_path / "1.tar", members)
    with open(tmp_path / "1.tar", "r+b") as file:
        file.truncate(9300)  # inside the header of b.txt
    (tmp_path / "2.tar").write_bytes(bytes(10240))
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 5}))
    found = {(finding["shard"], finding["severity"], finding["key"]) for finding in check(str(tmp_path)).findings}
    assert found == {
        ("0.tar", "error", ""),
        ("0.tar", "warning", "a"),
        ("1.tar", "error", ""),
        ("1.tar", "error", "b"),
        ("2.tar", "warning", ""),
    }


def test_no_shards_is_an_error_that_names_them(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not there"):
        check(str(tmp_path / "nowhere"))
