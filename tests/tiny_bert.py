"""The smallest BERT with a tokenizer, as a folder of transformers'."""

import json

import torch

WORDS = ("a", "the", "red", "green", "blue", "dog", "cat", "house", "##s", "photo", "of", ",")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)


def write_tokenizer(folder):
    """Write a WordPiece vocabulary and what transformers wants to know of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_bert(folder):
    """Write the tokenizer, the config and random weights of a BERT of two blocks."""
    from transformers import BertConfig, BertModel

    write_tokenizer(folder)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
