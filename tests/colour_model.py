"""A two-tower model whose right answers are known beforehand: it sees the mean colour and reads colour words."""

import io

import numpy as np
import torch
from PIL import Image
from torch import nn

from softmoe_clip.data_pipelines.shard_writer import ShardWriter

COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 200, 60),
    "blue": (40, 60, 230),
    "yellow": (230, 220, 40),
    "purple": (150, 40, 200),
    "black": (10, 12, 14),
}


class ColourModel(nn.Module):
    """A picture's embedding is its mean colour; a text's, that of the first colour word in it."""

    def __init__(self):
        super().__init__()
        table = torch.tensor([*COLOURS.values(), (128, 128, 128)]) / 255 - 0.5
        self.words = nn.Embedding.from_pretrained(torch.cat([table, torch.full((len(table), 1), 0.1)], dim=1))
        self.visual = nn.Identity()

    def encode_image(self, pixels):
        colour = pixels.mean((-2, -1)) - 0.5
        return torch.cat([colour, torch.full((len(colour), 1), 0.1)], dim=1)

    def encode_text(self, token_ids):
        return self.words(token_ids)


def tokenizer(texts):
    words = list(COLOURS)
    return torch.tensor([next((words.index(w) for w in text.split() if w in words), len(words)) for text in texts])


def transform(picture):
    return torch.from_numpy(np.array(picture.convert("RGB").resize((8, 8)))).permute(2, 0, 1) / 255


def colour_encoder():
    from softmoe_clip.eval.encoder import Encoder

    return Encoder(ColourModel(), tokenizer, transform, batch_size=4)


def picture(colour, size=(16, 12)):
    """One flat PNG, as bytes."""
    data = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(data, "PNG")
    return data.getvalue()


def write_colours(out, damaged=False, shard_size=4):
    """One picture per colour; with `damaged`, another one in the middle that does not decode."""
    with ShardWriter(out, shard_size=shard_size) as writer:
        for place, colour in enumerate(COLOURS):
            if damaged and place == 2:
                writer.add(b"no picture", "png", ["a damaged thing"])
            writer.add(
                picture(colour), "png", [f"a {colour} square", f"something {colour}"], {"width": 16, "height": 12}
            )
    return str(out)
