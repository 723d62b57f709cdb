"""Tokenizers: sticky end token, lower case, quick on anything, the same bytes from the same captions."""

import json
import pickle
import subprocess
import sys
import time

import pytest
import torch
from tiny_bert import VOCABULARY, write_tokenizer

from softmoe_clip.data_pipelines.tokenizers import (
    SentencePieceTokenizer,
    Tokenizer,
    TransformersTokenizer,
    load_tokenizer,
    open_clip_tokenizer,
)
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("dog", "cat", "circle", "square", "bicycle", "house")
CAPTIONS = [f"A {c} {t} is left of the {d} {u}." for c in COLOURS for t in THINGS for d in COLOURS for u in THINGS]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(CAPTIONS, file, vocab_size=100)
    return file


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers") / "bert"
    write_tokenizer(folder)
    return folder


def test_every_kind_keeps_the_end_token_when_it_cuts(model_file, bert):
    for tokenizer in (SentencePieceTokenizer(model_file, 9), open_clip_tokenizer(9), TransformersTokenizer(bert, 9)):
        assert isinstance(tokenizer, Tokenizer)
        short, long = tokenizer(["a dog", "the red dog, the blue house and a green cat " * 30])
        assert short.dtype == torch.int64
        assert (long == tokenizer.eos_id).nonzero().tolist() == [[8]]
        first = (short == tokenizer.eos_id).nonzero()[0].item()
        assert first < 8
        assert (short[first + 1 :] == tokenizer.pad_id).all()


def test_sentencepiece_ids_are_those_of_the_reference(tmp_path):
    # A model like c4_en: padding 0, end 1, unknown 2. big_vision: lower case, encode, cut to l - 1, end token, pad 1.
    import sentencepiece

    SentencePieceTrainer = sentencepiece.SentencePieceTrainer
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS).lower())
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 3}
    SentencePieceTrainer.train(
        input=str(tmp_path / "captions.txt"), model_prefix=str(tmp_path / "c4"), vocab_size=34, **options
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "c4.model"))
    tokenizer = load_tokenizer(tmp_path / "c4.model", 16)
    captions = [*CAPTIONS[:3], "RED", "", "The Cat is left of the Bicycle. " * 9, "a zebra ½ 猫"]
    expected = []
    for caption in captions:
        ids = [*processor.encode(caption.lower())[:15], 1]
        expected.append(ids + [1] * (16 - len(ids)))
    assert tokenizer(captions).tolist() == expected
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 1, 34)


def test_transformers_ids_are_its_own_and_open_clips(bert):
    from open_clip.tokenizer import HFTokenizer
    from transformers import AutoTokenizer

    captions = ["a red dog", "", "Dogs, cats AND  houses\n of the blue dog" * 5, "é zebra [SEP]"]
    tokenizer = load_tokenizer(bert, 12)
    assert torch.equal(tokenizer(captions), HFTokenizer(str(bert), 12)(captions))
    theirs = AutoTokenizer.from_pretrained(bert)
    theirs = theirs(captions, max_length=12, truncation=True, padding="max_length", return_tensors="pt")
    assert torch.equal(tokenizer(captions), theirs.input_ids)
    words = [VOCABULARY[i] for i in tokenizer(["Dogs, a zebra"])[0]]
    assert words == ["[CLS]", "dog", "##s", ",", "a", "[UNK]", "[SEP]", *["[PAD]"] * 5]


def test_a_folder_of_transformers_wins_over_a_sentencepiece_file_in_it(bert, model_file, tmp_path):
    TransformersTokenizer(bert, 8).tokenizer.save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "tokenizer.model").write_bytes(model_file.read_bytes())
    assert isinstance(load_tokenizer(tmp_path / "both", 8), TransformersTokenizer)


def test_a_tokenizer_of_transformers_without_an_end_token_says_so(tmp_path):
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    fast = FastTokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "dog": 3}, unk_token="[UNK]"))
    fast.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 4)
    assert tokenizer.eos_id is None
    assert tokenizer(["a dog"]).tolist() == [[2, 3, 0, 0]]


def test_a_token_at_both_ends_does_not_tell_the_end(tmp_path):
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    fast = FastTokenizer(WordLevel({"[PAD]": 0, "[E]": 1, "a": 2, "dog": 3}, unk_token="[PAD]"))
    fast.pre_tokenizer = Whitespace()
    fast.post_processor = TemplateProcessing(single="[E] $A [E]", special_tokens=[("[E]", 1)])
    PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="[PAD]", eos_token="[E]").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, 6)
    assert tokenizer(["a dog"]).tolist() == [[1, 2, 3, 1, 0, 0]]
    assert tokenizer.eos_id is None


def test_a_tokenizer_of_transformers_that_executes_code_or_cannot_pad_is_refused(tmp_path):
    for name, settings, message in [
        ("code", {"auto_map": {"AutoTokenizer": ["x.Tokenizer", None]}, "tokenizer_class": "Mine"}, "cannot|can load"),
        ("nopad", {"tokenizer_class": "BertTokenizer", "pad_token": None}, "no padding token"),
    ]:
        write_tokenizer(tmp_path / name)
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(settings))
        (tmp_path / name / "x.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tokenizer: pass\n")
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name, 8)
    assert not (tmp_path / "ran").exists()


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


@pytest.mark.parametrize("unknown", ["猫" * 300, "http://" + 90 * "é" + "/" + 400 * "é"])
def test_one_unknown_id_may_stand_for_any_number_of_letters(model_file, bert, unknown):
    caption = f"{unknown} a red dog"
    pieces, words = SentencePieceTokenizer(model_file, 9), TransformersTokenizer(bert, 9)
    ids = pieces.processor.encode(caption)[:8]
    assert pieces([caption])[0].tolist() == ids + (9 - len(ids)) * [1]
    inner = words.tokenizer.tokenizer
    assert words([caption])[0].tolist() == inner(caption, max_length=9, truncation=True, padding="max_length").input_ids


def test_a_lone_caption_is_a_list_of_one_and_no_captions_are_no_rows(model_file, bert):
    for tokenizer in (SentencePieceTokenizer(model_file, 9), open_clip_tokenizer(9), TransformersTokenizer(bert, 9)):
        assert tokenizer("a red dog").tolist() == tokenizer(["a red dog"]).tolist()
        assert tokenizer([]).shape == (0, 9)


def test_half_a_surrogate_is_read_as_a_question_mark(model_file):
    tokenizer = SentencePieceTokenizer(model_file, 9)
    assert tokenizer(["caf\udce9"]).tolist() == tokenizer(["caf?"]).tolist()


@pytest.mark.parametrize("caption", ["x" * 10_000, "a dog " * 1700, " " * 10_000, "é猫" * 5000, "\0" * 10_000])
def test_captions_of_ten_thousand_characters_are_quick(model_file, bert, caption):
    for tokenizer in (SentencePieceTokenizer(model_file, 24), open_clip_tokenizer(77), TransformersTokenizer(bert, 32)):
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
    write_tokenizer(tmp_path / "bert")
    tokenizers = {
        "a": SentencePieceTokenizer(model_file, 6),
        "b": open_clip_tokenizer(12),
        "c": TransformersTokenizer(tmp_path / "bert", 7),
    }
    for name, tokenizer in tokenizers.items():
        tokenizer.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        for attribute in ("context_length", "vocab_size", "pad_id", "eos_id"):
            assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
        assert torch.equal(loaded(CAPTIONS[:5]), tokenizer(CAPTIONS[:5]))
        assert torch.equal(pickle.loads(pickle.dumps(tokenizer))(CAPTIONS[:5]), tokenizer(CAPTIONS[:5]))
    assert load_tokenizer(tmp_path / "a", context_length=9).context_length == 9
    assert load_tokenizer(model_file, context_length=5)(["red"]).shape == (1, 5)


def test_what_is_cut_off_before_clips_bpe_changes_no_id():
    """Few ids can hold many letters: `photography` is one."""
    from open_clip import SimpleTokenizer

    caption = "photographers photographing international architectural landscapes " * 40
    whole = SimpleTokenizer(context_length=77)([caption])
    assert len(SimpleTokenizer().decode(whole[0].tolist())) > 77 * 9
    assert torch.equal(open_clip_tokenizer(77)([caption]), whole)


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_a_folder_of_transformers_pads_and_cuts_to_the_right_whatever_it_says(bert, tmp_path, side):
    write_tokenizer(tmp_path / "left")
    file = tmp_path / "left/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {side: "left"}))
    captions = ["a dog", "the red dog, the blue house of a green cat"]
    assert torch.equal(TransformersTokenizer(tmp_path / "left", 6)(captions), TransformersTokenizer(bert, 6)(captions))


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
    (tmp_path / "empty/softmoe_tokenizer.json").write_text('{"kind": "sentencepiece", "context_length": 8}')
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing: copy the tokenizer's files there again"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(ValueError, match="context_length"):
        load_tokenizer(model_file)
    for text in ("{", "[]", '{"kind": "open_clip", "context_length": "8"}'):
        (tmp_path / "empty" / "softmoe_tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            load_tokenizer(tmp_path / "empty")
    assert capfd.readouterr() == ("", "")


def test_importing_the_module_does_not_import_open_clip():
    code = (
        "import sys, softmoe_clip.data_pipelines.loader; sys.exit(any(m in sys.modules for m in ('open_clip', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
