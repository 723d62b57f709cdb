"""What becomes of a picture's bytes on packing: kept where they are plain, else upright, in RGB, resized if asked."""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Literal, NamedTuple

from PIL import ExifTags, Image

from softmoe_clip.data_pipelines.images import (
    JPEG_FORMATS,
    largest_shrink,
    load_pixels,
    load_rgb,
    open_picture,
    orientation,
    upright_size,
)

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
LOSSY_FORMATS = {"JPEG", "MPO", "WEBP", "AVIF", "JPEG2000"}
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
QUALITIES = {"jpeg": 95, "webp": 90}
FULL_COLOUR_QUALITY = 90  # from here on a JPEG keeps the colours' full resolution


@dataclass(frozen=True)
class Encoding:
    """How pictures go into shards: the longest that the shorter side may be, and whether all are encoded anew.

    `keep` encodes only what has to be, as JPEG what was lossy before and as PNG the rest; `quality` (1 to 100) is that
    of JPEG or WebP, else 95 and 90.
    """

    encode: Literal["keep", "jpeg", "png", "webp"] = "keep"
    quality: int | None = None
    shorter_side: int | None = None

    def __post_init__(self):
        if self.encode not in ("keep", *EXTENSIONS):
            raise ValueError(f"encode is {self.encode!r}: choose keep, jpeg, png or webp")
        if self.quality is not None and self.encode == "png":
            raise ValueError("PNG has no quality: leave it out, or choose jpeg or webp")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality is {self.quality}: choose 1 to 100")
        if self.shorter_side is not None and self.shorter_side < 1:
            raise ValueError(f"shorter_side is {self.shorter_side}: give a number of pixels, for example 256")


class Picture(NamedTuple):
    """A picture as it goes into a shard, and how large it was, upright, before; EXIF and sha256 of its bytes before."""

    data: bytes
    extension: str
    width: int
    height: int
    original_width: int
    original_height: int
    exif: str
    sha256: str


def for_shard(data: bytes, encoding: Encoding = Encoding()) -> Picture:
    """Check that a picture decodes whole; keep its bytes where any decoder shows them upright in RGB, else encode anew.

    Raises ValueError with the reason for a picture that can't be used.
    """
    picture = open_picture(data)
    if picture.format not in JPEG_FORMATS:
        load_pixels(picture)  # before any look at EXIF, which Pillow can't reach without decoding a PNG
    size = upright_size(picture)
    target = shrunk(size, encoding.shorter_side)
    about = (exif_text(picture), hashlib.sha256(data).hexdigest())
    if encoding.encode == "keep" and target == size and is_plain(picture):
        extension = KEPT_FORMATS[picture.format]
        load_rgb(picture, largest_shrink(min(size), 8))
        return Picture(data, extension, *size, *size, *about)
    kind = encoding.encode
    if kind == "keep":
        kind = "jpeg" if picture.format in LOSSY_FORMATS else "png"
    # The decoder's own scaling is exact down to twice the size; the rest is Lanczos's.
    rgb = load_rgb(picture, 1 if target == size else largest_shrink(min(size), 2 * min(target)))
    if rgb.size != target:
        rgb = rgb.resize(target, Image.Resampling.LANCZOS)
    return Picture(encoded(rgb, kind, encoding.quality), EXTENSIONS[kind], *target, *size, *about)


def shrunk(size: tuple[int, int], shorter_side: int | None) -> tuple[int, int]:
    """Scale a size so that its shorter side is `shorter_side`; never up."""
    shorter = min(size)
    if shorter_side is None or shorter <= shorter_side:
        return size
    width, height = (max(shorter_side, round(side * shorter_side / shorter)) for side in size)
    return width, height


def is_plain(picture: Image.Image) -> bool:
    """True for what every decoder shows in the same way."""
    return (
        picture.format in KEPT_FORMATS
        and picture.mode in ("RGB", "L")
        and not picture.has_transparency_data
        and (picture.format == "MPO" or getattr(picture, "n_frames", 1) == 1)
        and orientation(picture) == 1
    )


def encoded(rgb: Image.Image, kind: str, quality: int | None) -> bytes:
    """Encode as jpeg, png or webp."""
    file, quality = io.BytesIO(), quality or QUALITIES.get(kind)
    try:
        if kind == "jpeg":
            rgb.save(file, "JPEG", quality=quality, subsampling=0 if quality >= FULL_COLOUR_QUALITY else 2)
        elif kind == "webp":
            rgb.save(file, "WEBP", quality=quality)
        else:
            rgb.save(file, "PNG")
    except (OSError, ValueError) as error:
        raise ValueError(f"picture does not encode: {error}") from error
    return file.getvalue()


def exif_text(picture: Image.Image) -> str:
    """Return the main EXIF tags as JSON, as img2dataset keeps them; empty where there are none, or broken ones."""
    if "exif" not in picture.info:
        return "{}"
    try:
        tags = {ExifTags.TAGS.get(tag, str(tag)): str(value)[:200] for tag, value in picture.getexif().items()}
        return json.dumps(dict(sorted(tags.items())))
    except Exception:
        return "{}"
