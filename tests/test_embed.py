"""Embedding folders: the layout of clip-retrieval, one row per readable picture, all or nothing."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from colour_model import COLOURS, colour_encoder, write_colours

from softmoe_clip.search.embed import embed


@pytest.fixture
def encoder():
    return colour_encoder()


def test_rows_are_the_encoders_unit_vectors_in_shard_order(encoder, tmp_path):
    shards = write_colours(tmp_path / "shards")
    report = embed(encoder, shards, tmp_path / "out", model_name="some:tag")
    images = np.load(tmp_path / "out/img_emb/img_emb_0000.npy")
    texts = np.load(tmp_path / "out/text_emb/text_emb_0000.npy")
    assert images.dtype == np.float32
    assert images.shape == texts.shape == (len(COLOURS), 4)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)
    # The model is exact: each picture lies on the vector of its own caption, up to the rounding of 8-bit colours.
    np.testing.assert_array_equal((images @ texts.T).argmax(1), np.arange(len(COLOURS)))
    table = pq.read_table(tmp_path / "out/metadata/metadata_0000.parquet").to_pylist()
    assert [row["caption"] for row in table] == [f"a {colour} square" for colour in COLOURS]
    assert table[5] == {
        "image_path": "00001.tar/000010001.png",
        "caption": "a black square",
        "captions": ["a black square", "something black"],
        "key": "000010001",
        "shard": "00001.tar",
        "sample": 5,
        "width": 16,
        "height": 12,
    }
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert (meta["model"], meta["num_rows"], meta["width"]) == ("some:tag", 6, 4)
    assert report.num_rows == 6
    assert report.skipped == []


@pytest.mark.slow
def test_workers_change_no_byte(encoder, tmp_path, folder_bytes):
    shards = write_colours(tmp_path / "shards")
    for num_workers in (0, 2):
        encoder.num_workers = num_workers
        embed(encoder, shards, tmp_path / f"{num_workers}", rows_per_file=4)
    assert folder_bytes(tmp_path / "0") == folder_bytes(tmp_path / "2")


@pytest.mark.parametrize("model", ["runs/a", "local-dir:runs/a"])
def test_the_model_is_found_again_from_any_folder(encoder, tmp_path, monkeypatch, model):
    shards = write_colours(tmp_path / "shards")
    (tmp_path / "runs/a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    embed(encoder, shards, "out", model_name=model)
    assert json.loads((tmp_path / "out/meta.json").read_text())["model"] == str(tmp_path / "runs/a")


def test_rows_are_cut_into_files_that_together_are_the_whole(encoder, tmp_path):
    shards = write_colours(tmp_path / "shards")
    embed(encoder, shards, tmp_path / "one")
    embed(encoder, shards, tmp_path / "many", rows_per_file=4)
    whole = np.load(tmp_path / "one/img_emb/img_emb_0000.npy")
    parts = [np.load(path) for path in sorted((tmp_path / "many/img_emb").iterdir())]
    assert [len(part) for part in parts] == [4, 2]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    tables = [pq.read_table(path) for path in sorted((tmp_path / "many/metadata").iterdir())]
    assert [key for table in tables for key in table["sample"].to_pylist()] == list(range(6))


def test_a_damaged_picture_has_no_row_and_is_listed(encoder, tmp_path):
    shards = write_colours(tmp_path / "shards", damaged=True)
    report = embed(encoder, shards, tmp_path / "out")
    assert report.num_rows == 6
    (skipped,) = report.skipped
    assert skipped["key"] == "000000002"
    assert "picture" in skipped["reason"]
    samples = pq.read_table(tmp_path / "out/metadata/metadata_0000.parquet")["sample"].to_pylist()
    assert samples == [0, 1, 3, 4, 5, 6]
    assert json.loads((tmp_path / "out/meta.json").read_text())["skipped"] == report.skipped


def test_float16_halves_the_files_and_keeps_the_order_of_answers(encoder, tmp_path):
    shards = write_colours(tmp_path / "shards")
    embed(encoder, shards, tmp_path / "out", dtype="float16")
    images = np.load(tmp_path / "out/img_emb/img_emb_0000.npy")
    assert images.dtype == np.float16


def test_a_folder_that_holds_something_is_refused_and_kept(encoder, tmp_path):
    shards = write_colours(tmp_path / "shards")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="out"):
        embed(encoder, shards, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_work_that_is_broken_off_leaves_nothing(encoder, tmp_path, error):
    shards = write_colours(tmp_path / "shards")

    def stop(texts):
        raise error

    encoder.tokenizer = stop
    with pytest.raises(error):
        embed(encoder, shards, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]
