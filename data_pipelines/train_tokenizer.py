"""Make a sentencepiece model from captions."""

import io
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from softmoe_clip.data_pipelines.new_folder import write_whole
from softmoe_clip.data_pipelines.tokenizers import spaced

# The trainer skips sentences over 4,192 bytes; 1,000 characters are at most 4,000.
MAX_TRAINING_CHARACTERS = 1000


def train_tokenizer(captions: Iterable[str], out_file: str | Path, vocab_size: int = 2000) -> None:
    """Train a sentencepiece BPE model on lower-cased captions; the same captions always give the same bytes.

    The vocabulary gets smaller by itself where the captions don't hold that many pieces. End token 1, as in the
    reference. Raises ValueError without captions.
    """
    from sentencepiece import SentencePieceTrainer

    texts = (text for caption in captions if (text := spaced(caption)[:MAX_TRAINING_CHARACTERS].lower()))
    first = next(texts, None)
    if first is None:
        raise ValueError("a tokenizer needs captions to train on, and there are none: check the shards' .txt members")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=chain([first], texts),
            model_writer=model,
            # With few different words, unigram prunes words apart into letters; BPE keeps them whole.
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            num_threads=1,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rpartition("] ")[2]  # without the line of C++ that found it
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be trained on these captions ({reason})") from None
    write_whole(Path(out_file), model.getvalue())
