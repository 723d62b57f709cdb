"""What tests of loaders share: a tokenizer, pictures, and batches to compare."""

import io

import numpy as np
import torch
from PIL import Image

from softmoe_clip.data_pipelines.loader import train_batches
from softmoe_clip.data_pipelines.pictures import RandomCrop
from softmoe_clip.data_pipelines.transforms import Augment


class Letters:
    """A tokenizer without a vocabulary file: one id per letter."""

    context_length, vocab_size, pad_id, eos_id = 6, 128, 0, 1

    def __call__(self, captions):
        rows = [[*[ord(letter) % 128 for letter in caption[:5]], 1] for caption in captions]
        return torch.tensor([row + [0] * (6 - len(row)) for row in rows])


def picture(number: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((60 + number, 50)).save(file, kind)
    return file.getvalue()


def batches(shards, **changes):
    picture = changes.pop("picture", None) or RandomCrop(changes.pop("image_size", 16), Augment(flip=True))
    options = {"picture": picture, "batch_size": 8, "seed": 5, "num_batches": 10}
    return list(train_batches(shards, Letters(), **{**options, **changes}))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for tensor, other in zip(a[:4], b[:4], strict=True):
            assert torch.equal(tensor, other)
        assert a[4:] == b[4:]
