"""What an architecture says of a tokenizer of transformers', and a folder that has lost its words."""

import json

import pytest
import torch
from tiny_bert import write_tokenizer

from softmoe_clip.data_pipelines.tokenizers import load_tokenizer, options_in, set_options


@pytest.fixture
def bert(tmp_path):
    write_tokenizer(tmp_path / "words")
    return tmp_path / "words"


@pytest.mark.parametrize(
    ("options", "ends"),
    [({"clean": "canonicalize"}, True), ({"strip_sep_token": True}, False), ({"tokenizer_mode": "clips"}, True)],
)
def test_what_an_architecture_says_of_its_tokenizer_is_done_and_travels(bert, tmp_path, options, ends):
    from open_clip.tokenizer import HFTokenizer

    captions = ["a red dog, the cat.", "A HOUSE"]
    if "tokenizer_mode" in options:  # whose ids need tokens that a BERT has under other names
        write_tokenizer(tmp_path / "bert")
        file = tmp_path / "bert/tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"bos_token": "[MASK]", "eos_token": "[SEP]"}))
        bert = tmp_path / "bert"
    tokenizer = load_tokenizer(bert, 9, options)
    assert torch.equal(tokenizer(captions), HFTokenizer(str(bert), 9, **options)(captions))
    assert not torch.equal(tokenizer(captions), load_tokenizer(bert, 9)(captions))
    assert (tokenizer.eos_id is not None) == ends
    assert not ends or (tokenizer(captions) == tokenizer.eos_id).sum(1).tolist() == [1, 1]
    tokenizer.save(tmp_path / "saved")
    assert torch.equal(load_tokenizer(tmp_path / "saved")(captions), tokenizer(captions))


@pytest.mark.parametrize("options", [{}, {"clean": "lower"}, {"tokenizer_mode": "clips", "strip_sep_token": True}])
@pytest.mark.parametrize("text_cfg", [{}, {"tokenizer_kwargs": {"clean": "canonicalize"}, "tokenizer_mode": "clips"}])
def test_a_text_cfg_tells_open_clip_what_the_tokenizer_does(options, text_cfg):
    text_cfg = dict(text_cfg)
    set_options(text_cfg, options)
    assert options_in(text_cfg) == options


def test_a_tokenizer_of_transformers_that_has_lost_its_words_is_refused(bert, tmp_path):
    load_tokenizer(bert, 9).save(tmp_path / "bert")
    for file in tmp_path.glob("bert/tokenizer.json"), tmp_path.glob("bert/vocab.txt"):
        for path in file:
            path.unlink()
    (tmp_path / "bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"the tokenizer in .*bert knows no words: copy its files there again"):
        load_tokenizer(tmp_path / "bert")
