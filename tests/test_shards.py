import json

import pytest

from softmoe_clip.data_pipelines.shards import find_shards


@pytest.fixture
def shards(tmp_path):
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for number in (2, 0, 1):
            (tmp_path / folder / f"{number:05d}.tar").write_bytes(b"")
    (tmp_path / "train" / "sizes.json").write_text(json.dumps({"00000.tar": 7, "00002.tar": 5}))
    (tmp_path / "val" / "00001_stats.json").write_text(json.dumps({"count": 9, "successes": 8}))
    return tmp_path


def names(pattern):
    return [shard.url.rsplit("/", 2)[-2][0] + shard.url[-5] for shard in find_shards(pattern)]


def test_a_folder_gives_its_tars_sorted_with_their_counts(shards):
    found = find_shards(str(shards / "train"))
    assert [shard.url for shard in found] == [str(shards / "train" / f"0000{n}.tar") for n in range(3)]
    assert [shard.num_samples for shard in found] == [7, None, 5]
    assert [shard.num_samples for shard in find_shards(str(shards / "val"))] == [None, 8, None]


def test_braces_stars_joined_patterns_and_lists_keep_their_order(shards):
    assert names(f"{shards}/train/0000{{0..1}}.tar") == ["t0", "t1"]
    assert names(f"{shards}/train/0000{{2,0}}.tar") == ["t2", "t0"]
    assert names(f"{shards}/val/*1.tar") == ["v1"]
    assert names(f"{shards}/val::{shards}/train/00001.tar") == ["v0", "v1", "v2", "t1"]
    assert names([f"{shards}/train/00001.tar", f"{shards}/val/00000.tar"]) == ["t1", "v0"]
    assert names(f"{shards}/{{val,train}}") == ["v0", "v1", "v2", "t0", "t1", "t2"]


def test_a_path_that_holds_colons_goes_into_a_list(tmp_path):
    odd = tmp_path / "a::b [1]"
    odd.mkdir()
    (odd / "0.tar").write_bytes(b"")
    assert len(find_shards([str(odd)])) == len(find_shards([str(odd / "0.tar")])) == 1


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("", "the pattern '' is empty"),
        ("nowhere", "nowhere is not there: check the path"),
        ("{root}/nowhere.tar", r"nowhere\.tar is not there"),
        ("{root}/train/0000{{1..4}}.tar", r"2 of the 4 shards of .* are not there \(first: .*00003\.tar\)"),
        ("{root}/train/x*.tar", r"x\*\.tar is not there"),
        ("{root}/nowhere/*.tar", r"nowhere/\*\.tar is not there"),
        ("{root}", r"no shards \(\*\.tar\) in .*: name one of its folders: .*train, .*val"),
        ("{root}/empty", r"no shards .* in .*empty: make some with"),
        ("https://host/shards", r"cannot be listed: name its shards, as in https://host/shards/\{00000"),
        ("memory://nowhere", r"no shards \(\*\.tar\) in memory://nowhere"),
        ("warp://host/shards", "warp://host/shards cannot be listed"),
        ("pipe:cat x.tar", "can only be streamed, in training"),
    ],
)
def test_an_empty_match_is_an_error_that_names_the_pattern(shards, monkeypatch, pattern, reason):
    monkeypatch.chdir(shards)
    (shards / "empty").mkdir()
    with pytest.raises(ValueError, match=reason):
        find_shards(pattern.format(root=shards))


def test_a_damaged_sizes_file_is_named(shards):
    (shards / "train" / "sizes.json").write_text('{"00000.tar": ')
    with pytest.raises(ValueError, match=r"sizes\.json is damaged .* delete it"):
        find_shards(str(shards / "train"))
