"""The index over an embedding folder: exact, and only over parts that belong together."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softmoe_clip.search.index import index
from softmoe_clip.search.query import nearest, open_index, print_hits


def write_part(folder, part, images, texts=None, num_rows=None):
    """One part of an embedding folder as any tool might write it."""
    for kind, vectors in (("img_emb", images), ("text_emb", texts)):
        if vectors is not None:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            np.save(folder / kind / f"{kind}_{part}.npy", vectors)
    (folder / "metadata").mkdir(exist_ok=True)
    rows = len(images) if num_rows is None else num_rows
    table = pa.table({"image_path": [f"{part}-{i}.jpg" for i in range(rows)], "caption": ["words"] * rows})
    pq.write_table(table, folder / "metadata" / f"metadata_{part}.parquet")


def unit(rows, seed, width=16):
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_answers_equal_those_of_sorting_all_products(tmp_path):
    parts = [unit(50, 0), unit(30, 1)]
    for number, part in enumerate(parts):
        write_part(tmp_path, f"{number:04d}", part, part[:, ::-1])
    assert index(tmp_path) == tmp_path
    vectors, query = np.concatenate(parts), unit(1, 2)[0]
    hits = nearest(open_index(tmp_path), query, k=7)
    expected = np.argsort(-(vectors @ query))[:7]
    assert [hit.row for hit in hits] == expected.tolist()
    np.testing.assert_allclose([hit.score for hit in hits], (vectors @ query)[expected], atol=1e-6)
    texts = nearest(open_index(tmp_path), query[::-1], k=3, among="captions")
    assert [hit.row for hit in texts] == expected[:3].tolist()


def test_a_folder_of_clip_retrieval_with_float16_and_no_text_is_indexed(tmp_path):
    write_part(tmp_path, "0", unit(10, 0).astype(np.float16))
    index(tmp_path)
    opened = open_index(tmp_path)
    hits = nearest(opened, unit(10, 0)[3], k=100)
    assert len(hits) == 10
    assert (hits[0].row, hits[0].key, hits[0].caption) == (3, "0-3.jpg", "words")
    assert hits[0].score == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="text_emb"):
        nearest(opened, unit(10, 0)[3], among="captions")


def test_keys_that_are_numbers_are_printed(tmp_path, capsys):
    write_part(tmp_path, "0", unit(2, 0))
    pq.write_table(pa.table({"key": [0, 17], "caption": ["a", "b"]}), tmp_path / "metadata/metadata_0.parquet")
    print_hits(nearest(open_index(index(tmp_path)), unit(2, 0)[0]))
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["1.000", "0", "a"]
    assert second.split()[1:] == ["17", "b"]


def test_metadata_that_name_no_picture_are_refused(tmp_path):
    write_part(tmp_path, "0", unit(2, 0))
    index(tmp_path)
    pq.write_table(pa.table({"caption": ["a", "b"]}), tmp_path / "metadata/metadata_0.parquet")
    for use in (index, open_index):
        with pytest.raises(ValueError, match=r"metadata.* has neither a column `key` nor `image_path`"):
            use(tmp_path)


def test_an_index_elsewhere_stands_on_its_own(tmp_path):
    write_part(tmp_path / "emb", "0000", unit(5, 0), unit(5, 1))
    assert index(tmp_path / "emb", tmp_path / "index") == tmp_path / "index"
    assert not (tmp_path / "emb/image.index").exists()
    assert nearest(open_index(tmp_path / "index"), unit(5, 0)[2])[0].row == 2


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda folder: write_part(folder, "0001", unit(4, 0), unit(3, 0)), "text_emb_0001.npy has 3 rows"),
        (
            lambda folder: write_part(folder, "0001", unit(4, 0), unit(4, 0), num_rows=5),
            "metadata_0001.parquet has 5 rows",
        ),
        (lambda folder: (folder / "text_emb/text_emb_0000.npy").unlink(), "text_emb"),
        (lambda folder: (folder / "metadata/metadata_0000.parquet").unlink(), "metadata_0000.parquet is missing"),
        (lambda folder: write_part(folder, "0001", unit(4, 0, width=8), unit(4, 0, width=8)), "differ in width"),
        (lambda folder: (folder / "img_emb/img_emb_0000.npy").write_bytes(b"\x93NUMPY"), "img_emb_0000.npy"),
        (
            lambda folder: np.save(folder / "img_emb/img_emb_0000.npy", np.full((5, 16), np.nan, np.float32)),
            "not finite",
        ),
        (lambda folder: (folder / "img_emb/img_emb_0000.npy").unlink(), "no img_emb"),
        (lambda folder: (folder / "meta.json").write_text('{"model": '), "meta.json is damaged"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff"), "meta.json is damaged"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json is damaged"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused_by_name(tmp_path, break_it, named):
    write_part(tmp_path, "0000", unit(5, 0), unit(5, 1))
    break_it(tmp_path)
    if named == "text_emb":  # the last of the text files gone: then it is a folder without texts, which is fine
        assert not open_index(index(tmp_path)).text
        return
    with pytest.raises(ValueError, match=named) as error:
        index(tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.index*"))


@contextmanager
def no_large_file(out):
    """A disk on which no file grows beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def a_file_in_the_way(out):
    (out / ".index.partial").write_text("mine")
    yield
    (out / ".index.partial").unlink()


@contextmanager
def no_renaming_of_the_last(out):
    """The disk fails when all but one of the new pieces are in their place."""
    rename = os.rename

    def fail_at_last(before, after):
        if Path(after) == out / "metadata" and Path(before).parent.name == ".index.partial":
            raise OSError("disk gone")
        rename(before, after)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", fail_at_last)
        yield


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("block", [no_large_file, a_file_in_the_way, no_renaming_of_the_last])
def test_what_cannot_be_written_is_one_sentence_and_the_old_index_stays(tmp_path, block):
    write_part(tmp_path / "emb", "0000", unit(5, 0), unit(5, 1))
    out = index(tmp_path / "emb", tmp_path / "index")
    before = contents(out)
    write_part(tmp_path / "emb", "0000", unit(6, 3), unit(6, 4))
    with block(out), pytest.raises(ValueError, match=r"^cannot write the index to .*index \(.*--out$") as error:
        index(tmp_path / "emb", out)
    assert "\n" not in str(error.value)
    assert contents(out) == before


def test_the_index_of_other_embeddings_replaces_all_of_the_old_one(tmp_path):
    for part in ("0000", "0001"):
        write_part(tmp_path / "a", part, unit(5, 0), unit(5, 1))
    (tmp_path / "a/meta.json").write_text('{"model": "a"}')
    write_part(tmp_path / "b", "0000", unit(10, 2))
    index(tmp_path / "a", tmp_path / "out")
    opened = open_index(index(tmp_path / "b", tmp_path / "out"))
    assert (opened.rows.num_rows, opened.text, opened.meta) == (10, None, {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["image.index", "metadata"]


def test_texts_that_are_gone_leave_no_index_of_texts(tmp_path):
    write_part(tmp_path, "0000", unit(5, 0), unit(5, 1))
    index(tmp_path)
    (tmp_path / "text_emb/text_emb_0000.npy").unlink()
    assert open_index(index(tmp_path)).text is None


def test_an_index_of_other_texts_is_refused(tmp_path):
    write_part(tmp_path / "a", "0000", unit(5, 0), unit(5, 1))
    write_part(tmp_path / "b", "0000", unit(6, 0), unit(6, 1))
    (index(tmp_path / "b") / "text.index").replace(index(tmp_path / "a") / "text.index")
    with pytest.raises(ValueError, match=r"text\.index has 6 rows and its metadata 5: make the index again"):
        open_index(tmp_path / "a")


@pytest.mark.parametrize("kept", ["img_emb/img_emb_0.npy", "metadata/mine.csv", "meta.json"])
def test_what_belongs_to_no_index_is_not_replaced(tmp_path, kept):
    write_part(tmp_path / "emb", "0000", unit(5, 0))
    (tmp_path / "out" / kept).parent.mkdir(parents=True)
    (tmp_path / "out" / kept).write_text("mine")
    with pytest.raises(ValueError, match=r"(other embeddings|belongs to no index): choose another folder with --out"):
        index(tmp_path / "emb", tmp_path / "out")
    assert contents(tmp_path / "out") == {Path(kept): b"mine"}


def test_a_file_in_place_of_the_folder_is_one_sentence(tmp_path):
    write_part(tmp_path / "emb", "0000", unit(5, 0))
    (tmp_path / "index").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot write the index to .*index .*File exists"):
        index(tmp_path / "emb", tmp_path / "index")


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="softmoe-clip embed"):
        index(tmp_path / "nothing")
    with pytest.raises(ValueError, match="softmoe-clip index"):
        open_index(tmp_path)
