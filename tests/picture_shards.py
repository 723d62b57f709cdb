"""Small pictures that differ as photographs do, and shards of them."""

import io

import numpy as np
from PIL import Image

from softmoe_clip.data_pipelines.shard_writer import ShardWriter


def scene(seed: int, side: int = 96) -> Image.Image:
    """Soft blobs: as much shape as a photograph has, different for each seed."""
    rng = np.random.default_rng(seed)
    blobs = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8))
    return blobs.resize((side, side), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    """The bytes of a picture file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(seed: int) -> bytes:
    """A scene as PNG."""
    return encoded(scene(seed))


def whole(key: str, seed: int) -> list[tuple[str, bytes]]:
    """The members of a good sample."""
    return [(f"{key}.png", png(seed)), (f"{key}.txt", f"caption {seed}".encode())]


def write_set(out, pictures, captions=None, shard_size=1000):
    """Write a shard set of encoded pictures; return its folder."""
    with ShardWriter(out, shard_size) as writer:
        for number, picture in enumerate(pictures):
            writer.add(picture, "png", [captions[number] if captions else f"caption {number}"])
    return str(out)
