"""Tokenizers: sticky end token, lower case, quick on anything, the same bytes from the same captions."""

import pickle
import subprocess
import sys
import time

import pytest
import torch

from softmoe_clip.data_pipelines.tokenizers import (
    SentencePieceTokenizer,
    load_tokenizer,
    open_clip_tokenizer,
    train_tokenizer,
)

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("dog", "cat", "circle", "square", "bicycle", "house")
CAPTIONS = [f"A {c} {t} is left of the {d} {u}." for c in COLOURS for t in THINGS for d in COLOURS for u in THINGS]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(CAPTIONS, file, vocab_size=100)
    return file


def test_rows_end_and_are_padded_with_the_end_token(model_file):
    tokenizer = SentencePieceTokenizer(model_file, 8)
    token_ids = tokenizer(["red dog", "", "the red dog is left of the blue cat " * 5])
    assert token_ids.dtype == torch.int64
    assert token_ids.shape == (3, 8)
    assert tokenizer.pad_id == tokenizer.eos_id == 1
    assert (token_ids[:, -1] == tokenizer.eos_id).all()
    assert (token_ids[1] == tokenizer.eos_id).all()
    assert (token_ids[2, :-1] != tokenizer.eos_id).all()
    pieces = tokenizer.processor.encode("red dog")
    assert token_ids[0].tolist() == pieces + [1] * (8 - len(pieces))


def test_case_and_white_space_do_not_matter(model_file):
    tokenizer = SentencePieceTokenizer(model_file, 8)
    assert torch.equal(tokenizer(["A  RED\n dog"]), tokenizer(["a red dog"]))


def test_cutting_long_captions_changes_no_id(model_file):
    tokenizer = SentencePieceTokenizer(model_file, 8)
    caption = " ".join(CAPTIONS)[:10_000]
    whole = tokenizer.processor.encode(caption.lower())[:7]
    assert tokenizer([caption])[0].tolist() == [*whole, 1]


@pytest.mark.parametrize("caption", ["x" * 10_000, "a dog " * 1700, " " * 10_000, "é猫" * 5000, "\0" * 10_000])
def test_captions_of_ten_thousand_characters_are_quick(model_file, caption):
    for tokenizer in (SentencePieceTokenizer(model_file, 24), open_clip_tokenizer(77)):
        start = time.perf_counter()
        assert tokenizer([caption]).shape == (1, tokenizer.context_length)
        assert time.perf_counter() - start < 0.2


def test_training_gives_the_same_bytes_and_says_nothing(tmp_path, model_file, capfd):
    train_tokenizer(iter(CAPTIONS), tmp_path / "again.model", vocab_size=100)
    assert (tmp_path / "again.model").read_bytes() == model_file.read_bytes()
    assert capfd.readouterr() == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["again.model"]


@pytest.mark.parametrize("captions", [["a cat"], ["红色的猫在桌子上"], ["b", "", "c"], ["x" * 10_000, "y"]])
def test_tiny_sets_get_a_smaller_vocabulary(tmp_path, captions):
    train_tokenizer(captions, tmp_path / "tiny.model", vocab_size=2000)
    assert 3 <= SentencePieceTokenizer(tmp_path / "tiny.model", 4).vocab_size < 200


@pytest.mark.parametrize("captions", [[], ["", "  "]])
def test_no_captions_are_refused(tmp_path, captions):
    with pytest.raises(ValueError, match="needs captions"):
        train_tokenizer(captions, tmp_path / "none.model")
    assert not list(tmp_path.iterdir())


def test_saved_tokenizers_load_the_same(tmp_path, model_file):
    for name, tokenizer in {"a": SentencePieceTokenizer(model_file, 6), "b": open_clip_tokenizer(12)}.items():
        tokenizer.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        for attribute in ("context_length", "vocab_size", "pad_id", "eos_id"):
            assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
        assert torch.equal(loaded(CAPTIONS[:5]), tokenizer(CAPTIONS[:5]))
        assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(CAPTIONS[:5]), tokenizer(CAPTIONS[:5]))
    assert load_tokenizer(tmp_path / "a", context_length=9).context_length == 9
    assert load_tokenizer(model_file, context_length=5)(["red"]).shape == (1, 5)


def test_clip_ids_are_open_clips():
    import open_clip

    tokenizer = open_clip_tokenizer(16)
    long = "a photo of a dog " * 100
    assert torch.equal(
        tokenizer([*CAPTIONS[:20], long]), open_clip.SimpleTokenizer(context_length=16)([*CAPTIONS[:20], long])
    )
    assert tokenizer([long])[0, -1] == tokenizer.eos_id


def test_what_is_no_tokenizer_is_named(tmp_path, model_file, capfd):
    for data in (b"", b"<html>", model_file.read_bytes()[:-5]):
        (tmp_path / "cut.model").write_bytes(data)
        with pytest.raises(ValueError, match=r"cut\.model"):
            load_tokenizer(tmp_path / "cut.model", 8)
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere", 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "empty", 8)
    with pytest.raises(ValueError, match="context_length"):
        load_tokenizer(model_file)
    (tmp_path / "empty" / "softmoe_tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer(tmp_path / "empty")
    assert capfd.readouterr() == ("", "")


def test_importing_the_module_does_not_import_open_clip():
    code = (
        "import sys, softmoe_clip.data_pipelines.loader; sys.exit(any(m in sys.modules for m in ('open_clip', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
