"""Refuse a tokenizer that does not go with its text tower: ids that it does not know, padding that it would read."""

from torch import nn

CLIPS_PADDING = 0  # of open_clip's own tokenizer, which has no name for it


def check_tokenizer(model: nn.Module, tokenizer, source: str) -> None:
    """Raise ValueError where ids of `tokenizer` fall outside of a model's text tower, or its padding is none there."""
    largest, known = int(tokenizer(["a photo of a dog"]).max()), getattr(model, "vocab_size", 0)
    if known and largest >= known:  # 0: transformers does not say
        raise ValueError(
            f"{source}: the tokenizer gives ids up to {largest:,} and the text tower knows {known:,}: "
            "copy the tokenizer's files into the model folder"
        )
    from open_clip.hf_model import HFTextEncoder

    if isinstance(tower := getattr(model, "text", None), HFTextEncoder):
        pads, reads = padding_of(tokenizer), tower.config.pad_token_id
        if pads != reads:
            raise ValueError(
                f"{source}: the tokenizer pads captions with id {pads}, but the text tower takes {reads} for padding "
                "(pad_token_id in its config.json), so that it would read padding as words: make both the same"
            )


def padding_of(tokenizer) -> int:
    """Return the id that a tokenizer of ours, or one of open_clip's, pads with."""
    if hasattr(tokenizer, "pad_id"):
        return tokenizer.pad_id
    return getattr(getattr(tokenizer, "tokenizer", None), "pad_token_id", CLIPS_PADDING)
