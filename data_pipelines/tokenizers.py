"""From captions to ids: sentencepiece as the reference uses it, CLIP's BPE and transformers' through open_clip."""

import json
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from softmoe_clip.data_pipelines.new_folder import write_whole
from softmoe_clip.data_pipelines.samples import readable

SETTINGS_FILE = "softmoe_tokenizer.json"
MODEL_FILE = "tokenizer.model"
# Any of them makes a folder one of transformers': its fast tokenizers, their settings, BERT's words, T5's pieces.
TRANSFORMERS_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model")
# CLIP's BPE knows every byte and has no longer pieces: what is cut off beyond could not have become an id. The other
# kinds are not cut: one unknown id of theirs stands for any number of characters.
CLIP_CHARACTERS_PER_ID = 32


@runtime_checkable
class Tokenizer(Protocol):
    """What a tower needs of its tokenizer: int64 (b, l) for b captions, padded with `pad_id`, end token kept.

    `eos_id` is None for the few of transformers' that end a caption without a token.
    """

    context_length: int
    vocab_size: int
    pad_id: int
    eos_id: int | None

    def __call__(self, captions: str | list[str]) -> Tensor: ...

    def save(self, folder: str | Path) -> None: ...


class SentencePieceTokenizer:
    """Lower-cased sentencepiece ids with a sticky end token: cut to fit, the last id is always the end token.

    Padding is the end token too, as in the reference, so a tower that pools the last position always meets it.
    """

    def __init__(self, model_file: str | Path, context_length: int):
        from sentencepiece import SentencePieceProcessor

        check_context_length(context_length)
        self.context_length = context_length
        try:
            self.model_bytes = Path(model_file).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{model_file} is missing: copy the tokenizer's files there again") from None
        try:
            if not self.model_bytes:
                raise ValueError
            self.processor = SentencePieceProcessor(model_proto=self.model_bytes)
        except (RuntimeError, ValueError):
            raise ValueError(
                f"{model_file} is no whole sentencepiece model: make one with `softmoe-clip train-tokenizer`"
            ) from None
        self.vocab_size = self.processor.vocab_size()
        self.eos_id = self.pad_id = self.processor.eos_id()
        if self.eos_id < 0:
            raise ValueError(f"{model_file} has no end token: train the sentencepiece model with an eos_id")

    def __call__(self, captions: str | list[str]) -> Tensor:
        """Turn b captions into int64 (b, l); a lone one is a list of one."""
        captions = in_list(captions)
        token_ids = torch.full((len(captions), self.context_length), self.pad_id, dtype=torch.int64)
        # One thread: callers are loader workers, and a thread pool would not survive their fork.
        texts = [caption.lower() for caption in captions]
        for row, ids in zip(token_ids, self.processor.encode(texts, num_threads=1), strict=True):
            ids = ids[: self.context_length - 1]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return token_ids

    def save(self, folder: str | Path) -> None:
        """Write the model and its settings into a tokenizer or model folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / MODEL_FILE).write_bytes(self.model_bytes)
        write_settings(folder, "sentencepiece", self.context_length)


class OpenClipTokenizer:
    """CLIP's BPE vocabulary, from open_clip's own `SimpleTokenizer`."""

    def __init__(self, context_length: int):
        from open_clip import SimpleTokenizer

        check_context_length(context_length)
        self.context_length = context_length
        self.tokenizer = SimpleTokenizer(context_length=context_length)
        self.vocab_size = self.tokenizer.vocab_size
        self.eos_id = self.tokenizer.eot_token_id
        self.pad_id = 0

    def __call__(self, captions: str | list[str]) -> Tensor:
        """Turn b captions into int64 (b, l); a lone one is a list of one."""
        return self.tokenizer(cut_for_clip(in_list(captions), self.context_length))

    def save(self, folder: str | Path) -> None:
        """Write the settings; the vocabulary is part of open_clip."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_settings(folder, "open_clip", self.context_length)


class TransformersTokenizer:
    """A tokenizer in a folder of transformers' (or a name on the hub), through open_clip's own `HFTokenizer`.

    `options` are what a text_cfg says of it: open_clip's `tokenizer_mode` and what is in its `tokenizer_kwargs`.
    Nothing that the folder holds is executed. Padding goes to the right; special tokens survive the cut.
    """

    def __init__(self, source: str | Path, context_length: int, options: dict | None = None):
        # Its threads would not survive the fork of a loader's workers; open_clip says so, too, but only when imported.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from open_clip.tokenizer import HFTokenizer

        check_context_length(context_length)
        self.context_length, self.options = context_length, dict(options or {})
        try:
            self.tokenizer = HFTokenizer(str(source), context_length, **{**self.options, "trust_remote_code": False})
        except Exception as error:  # a damaged file fails in many ways, and each of them means the same to the user
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{source} holds no tokenizer that transformers can load: {reason}") from None
        inner = self.tokenizer.tokenizer
        inner.padding_side = inner.truncation_side = "right"
        if inner.pad_token_id is None:
            raise ValueError(f"the tokenizer in {source} has no padding token: set its pad_token")
        check_vocabulary(inner, source)
        self.vocab_size, self.pad_id = len(inner), inner.pad_token_id
        self.eos_id = end_token(inner, self.options)

    def __call__(self, captions: str | list[str]) -> Tensor:
        """Turn b captions into int64 (b, l); a lone one is a list of one."""
        if not (captions := in_list(captions)):  # of which transformers makes nothing
            return torch.empty(0, self.context_length, dtype=torch.int64)
        return self.tokenizer(captions)

    def save(self, folder: str | Path) -> None:
        """Write transformers' own files, and the settings."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        write_settings(folder, "transformers", self.context_length, self.options)


def end_token(inner, options: dict) -> int | None:
    """Return the id that ends every caption of a tokenizer of transformers', used with open_clip's options, if any."""
    if options.get("tokenizer_mode") == "clips":  # which puts it after the padding
        return inner.cls_token_id
    *before, last = inner("a").input_ids
    if options.get("strip_sep_token") and last == inner.sep_token_id:
        return None
    # One that begins a caption, too, does not tell its end.
    return last if last in inner.all_special_ids and last not in before else None


def check_vocabulary(inner, source: str | Path) -> None:
    """Refuse a tokenizer without words, which transformers makes of a folder that has lost the file with them."""
    if len(inner) <= len(inner.all_special_ids):
        raise ValueError(f"the tokenizer in {source} knows no words: copy its files there again, tokenizer.json first")


def options_in(text_cfg: dict) -> dict:
    """Return how open_clip makes a text tower's tokenizer of transformers'."""
    mode = text_cfg.get("tokenizer_mode")
    return (text_cfg.get("tokenizer_kwargs") or {}) | ({} if mode is None else {"tokenizer_mode": mode})


def set_options(text_cfg: dict, options: dict) -> None:
    """Write into a text_cfg what `options_in` reads, so that open_clip makes the same ids with a model's folder."""
    if options != options_in(text_cfg):
        text_cfg["tokenizer_mode"] = options.get("tokenizer_mode")
        text_cfg["tokenizer_kwargs"] = {name: value for name, value in options.items() if name != "tokenizer_mode"}


def open_clip_tokenizer(context_length: int = 77) -> OpenClipTokenizer:
    """Make a tokenizer with CLIP's BPE vocabulary (49,408 ids)."""
    return OpenClipTokenizer(context_length)


def load_tokenizer(source: str | Path, context_length: int | None = None, options: dict | None = None) -> Tokenizer:
    """Load from a folder that `save` or transformers wrote, or a sentencepiece file; `context_length` wins over theirs.

    `options` are those of a tokenizer of transformers' whose folder does not say them.
    Raises ValueError where nothing says how long the rows are, or what kind of tokenizer it is.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(
            f"tokenizer {source} does not exist: give a folder with {SETTINGS_FILE}, one of transformers', or a "
            "sentencepiece model"
        )
    settings = read_settings(source) if source.is_dir() else {"kind": "sentencepiece"}
    context_length = context_length or settings.get("context_length")
    if context_length is None:
        raise ValueError(f"tokenizer {source} does not say its context_length: give one")
    if settings["kind"] == "open_clip":
        return OpenClipTokenizer(context_length)
    if settings["kind"] == "transformers":
        return TransformersTokenizer(source, context_length, settings.get("options", options))
    return SentencePieceTokenizer(source / MODEL_FILE if source.is_dir() else source, context_length)


def in_list(captions: str | list[str]) -> list[str]:
    """Make a lone caption a list of one, and runs of white space one space.

    Half a surrogate, as a terminal makes of bytes that are no UTF-8, is no text to any tokenizer.
    """
    return [readable(spaced(caption)) for caption in ([captions] if isinstance(captions, str) else captions)]


def spaced(caption: str) -> str:
    """Make runs of white space one space."""
    return " ".join(caption.split())


def cut_for_clip(captions: list[str], num_ids: int) -> list[str]:
    """Cut off what CLIP's BPE cannot make one of its first ids of: 10,000 letters in a row keep it busy for minutes."""
    return [caption[: num_ids * CLIP_CHARACTERS_PER_ID] for caption in captions]


def check_context_length(context_length: int) -> None:
    """Refuse rows without room for a word and the end token."""
    if context_length < 2:
        raise ValueError(f"context_length must be 2 or more, got {context_length}")


def write_settings(folder: str | Path, kind: str, context_length: int, options: dict | None = None) -> None:
    """Say in the folder which tokenizer it is."""
    settings = {"kind": kind, "context_length": context_length} | ({} if options is None else {"options": options})
    write_whole(Path(folder) / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")


def read_settings(folder: Path) -> dict:
    """Read what `write_settings` wrote; a folder of transformers' and a lone sentencepiece model need no settings."""
    file = folder / SETTINGS_FILE
    if not file.exists():
        if any((folder / name).exists() for name in TRANSFORMERS_FILES):
            return {"kind": "transformers"}
        if (folder / MODEL_FILE).exists():
            return {"kind": "sentencepiece"}
        raise ValueError(
            f"{folder} holds no tokenizer: neither {SETTINGS_FILE}, {MODEL_FILE} nor tokenizer.json is there"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        kind = settings["kind"]
        if not isinstance(settings.get("context_length"), int | None) or not isinstance(
            settings.get("options", {}), dict
        ):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{file} is damaged: it should hold a kind and a context_length") from None
    if kind not in ("sentencepiece", "open_clip", "transformers"):
        raise ValueError(f"{file} names the kind {kind!r}; known are sentencepiece, open_clip and transformers")
    return settings
