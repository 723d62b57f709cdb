"""Copies of a picture are found, different pictures are not: measured on photographs, and against a slow search."""

import io
import os
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softmoe_clip.data_pipelines import picture_hash
from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.picture_hash import (
    COLOUR_BYTES,
    HASH_BYTES,
    MAX_BITS,
    MAX_COARSE_BITS,
    MAX_PATCH,
    MAX_SHIFT,
    MIN_SIDE,
    Look,
    look_of,
    nearest_earlier,
    nearest_in,
)

DATA = Path(os.environ.get("SOFTMOE_CLIP_DATA") or "absent")
needs_photographs = pytest.mark.skipif(not (DATA / "flickr8k").is_dir(), reason="needs SOFTMOE_CLIP_DATA with flickr8k")


def look(pictures) -> Look:
    looks = [look_of(picture) for picture in pictures]
    shapes = b"".join(shapes or bytes(HASH_BYTES) for shapes, _ in looks)
    colours = b"".join(colours for _, colours in looks)
    return Look(
        np.frombuffer(shapes, np.uint8).reshape(-1, HASH_BYTES),
        np.frombuffer(colours, np.uint8).reshape(-1, COLOUR_BYTES),
        np.array([bool(shapes) for shapes, _ in looks]),
    )


def recompressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def cropped(picture: Image.Image, share: float) -> Image.Image:
    width, height = picture.size
    edge = share / 2
    return picture.crop(tuple(round(v) for v in (width * edge, height * edge, width * (1 - edge), height * (1 - edge))))


COPIES = {
    "recompressed": (recompressed, 1.0),
    "halved": (lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS), 1.0),
    "enlarged": (lambda p: p.resize((p.width * 17 // 10, p.height * 17 // 10), Image.Resampling.BICUBIC), 1.0),
    "cropped by 3 %": (lambda p: cropped(p, 0.03), 0.98),
    "cropped by 5 %": (lambda p: cropped(p, 0.05), 0.7),
    "brighter": (lambda p: p.point(lambda v: min(255, int(v * 1.15) + 5)), 0.98),
    "darker": (lambda p: p.point(lambda v: int(v * 0.85)), 0.98),
    "all at once": (lambda p: recompressed(cropped(p, 0.03).resize((100, 100))), 0.98),
}


@needs_photographs
def test_copies_of_photographs_are_found_and_nothing_else():
    files = random.Random(0).sample(sorted((DATA / "flickr8k" / "images").iterdir()), 300)
    originals = [decode_rgb(file.read_bytes()) for file in files]
    base = look(originals)
    assert nearest_earlier(base) == []
    for name, (copy, least) in COPIES.items():
        hits = nearest_in(base, look(copy(picture) for picture in originals[:60]))
        assert all(query == hit for query, hit, _ in hits), name
        assert len(hits) >= least * 60, name


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="needs SOFTMOE_CLIP_DATA with cifar10")
def test_the_doubled_deer_of_cifar_10_is_found_in_train_and_test_though_its_tint_differs():
    train, test = (sorted((DATA / "cifar10" / split / "deer").iterdir()) for split in ("train", "test"))
    train_look, test_look = (look(decode_rgb(file.read_bytes()) for file in files) for files in (train, test))
    found = [(train[a].name, test[b].name) for a, b, _ in nearest_in(test_look, train_look)]
    assert found == [("2881.png", "0511.png")]


@pytest.mark.slow
@needs_photographs
def test_of_28_million_pairs_of_photographs_only_the_doubled_one_is_found():
    files = sorted((DATA / "flickr8k" / "images").iterdir())
    pairs = nearest_earlier(look(decode_rgb(file.read_bytes(), MIN_SIDE) for file in files))
    assert [(bits, files[a].name, files[b].name) for a, b, bits in pairs] == [
        (0, "3050606344_af711c726c.jpg", "2851198725_37b6027625.jpg")
    ]


def test_a_picture_decoded_smaller_looks_the_same():
    blobs = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8))
    file = io.BytesIO()
    blobs.resize((800, 600), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    whole, small = (look([decode_rgb(file.getvalue(), side)]) for side in (None, MIN_SIDE))
    ((_, _, bits),) = nearest_in(whole, small)
    assert bits < MAX_BITS / 3


def test_one_shape_in_other_colours_is_another_picture():
    def flag(colour):
        picture = Image.new("RGB", (90, 60), "white")
        picture.paste(colour, (0, 0, 30, 60))
        picture.paste("navy", (60, 0, 90, 60))
        return picture

    flags = look(map(flag, [(200, 0, 0), (0, 102, 0), (190, 6, 6)]))
    assert [(a, b) for a, b, _ in nearest_earlier(flags)] == [(2, 0)]


def test_one_shape_in_many_colours_finds_its_own_among_them():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (300, COLOUR_BYTES), np.uint8)
    colours[299] = colours[7]
    shapes = np.full((300, HASH_BYTES), 85, np.uint8)
    assert nearest_earlier(Look(shapes, colours, np.ones(300, bool))) == [(299, 7, 0)]


def test_pictures_of_one_tone_have_no_look_to_compare():
    assert nearest_earlier(look(Image.new("RGB", (20, 20), tone) for tone in ("white", "white", "black"))) == []
    assert nearest_in(look([]), look([Image.linear_gradient("L").convert("RGB")])) == []


def colours_differ(one, other) -> bool:
    """Compare the patches one by one."""
    channels = [int(a) - int(b) for a, b in zip(one, other, strict=True)]
    patches = [channels[k : k + 3] for k in range(0, 48, 3)]
    shift = [statistics.median(patch[c] for patch in patches) for c in range(3)]
    most = max(sum(abs(patch[c] - shift[c]) for c in range(3)) / 3 for patch in patches)
    return most > MAX_PATCH or sum(map(abs, shift)) / 3 > MAX_SHIFT


@pytest.mark.parametrize("multi", [False, True])
def test_the_search_finds_what_a_comparison_of_all_pairs_finds(monkeypatch, multi):
    if multi:  # tables instead of a scan
        monkeypatch.setattr(picture_hash, "FEW", 0)
    rng = np.random.default_rng(0)
    n = 400
    shapes = rng.integers(0, 256, (n, HASH_BYTES), np.uint8)
    colours = rng.integers(60, 180, (n, COLOUR_BYTES), np.uint8)
    for copy in range(200, n):  # near copies of earlier ones, some too far
        source = rng.integers(copy)
        flipped = np.zeros(256, np.uint8)
        flipped[rng.choice(256, rng.integers(60), replace=False)] = 1
        shapes[copy] = shapes[source] ^ np.packbits(flipped)
        shift = np.full((16, 3), rng.integers(1.2 * MAX_SHIFT))
        shift[5] += rng.integers(-2 * MAX_PATCH, 2 * MAX_PATCH)
        colours[copy] = np.clip(colours[source] + shift.ravel(), 0, 255)
    everything = Look(shapes, colours, rng.random(n) < 0.95)
    expected = []
    for i in everything.has_shapes.nonzero()[0]:
        bits = np.bitwise_count(shapes[i] ^ shapes[:i]).sum(1)
        coarse = np.bitwise_count(shapes[i, :8] ^ shapes[:i, :8]).sum(1)
        # The tables promise to find 8 coarse bits, and find nearly all up to 10.
        near = (bits <= MAX_BITS) & (coarse <= (8 if multi else MAX_COARSE_BITS)) & everything.has_shapes[:i]
        close = [(int(bits[j]), int(j)) for j in near.nonzero()[0] if not colours_differ(colours[i], colours[j])]
        if close:
            expected.append((int(i), min(close)[1], min(close)[0]))
    found = nearest_earlier(everything)
    assert len(expected) > 50
    if multi:
        assert {pair[0] for pair in expected} <= {pair[0] for pair in found}
    else:
        assert found == expected
