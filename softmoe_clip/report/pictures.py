"""Pictures for the page: decoded from shards, made small, written into the file as data URIs."""

import base64
import io

from PIL import Image

from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.tar_index import ShardSet

THUMBNAIL = 288  # pixels


def read_picture(shards: ShardSet, sample: int) -> Image.Image:
    """Decode the picture of a sample."""
    return decode_rgb(read_pair(shards.read(sample)).image)


def thumbnail_uri(picture: Image.Image) -> str:
    """Make the shorter side THUMBNAIL pixels, or twice its own size where that is less, and give a data URI."""
    scale = min(2.0, THUMBNAIL / min(picture.size))
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return data_uri(picture.resize(size, Image.Resampling.LANCZOS))


def data_uri(picture: Image.Image, quality: int = 80) -> str:
    """Write a picture as a JPEG data URI, with full colour resolution: drawn scenes have hard coloured edges."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=quality, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
