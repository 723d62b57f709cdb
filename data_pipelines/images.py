"""From the bytes of a picture file to an upright RGB picture: limits first, then decoding, no surprises."""

import ctypes
import io
import logging
import re
import warnings
from functools import cache

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

# Pillow's own warning level: 89 megapixels take about 270 MB as RGB, four times as much with transparency on the way.
# Read from the header, before decoding.
MAX_PIXELS = 89_478_485
# What phones and medium formats make today: such a JPEG is decoded at 1/2 or 1/4, so that no more than MAX_PIXELS come
# out. Not a progressive one, whose coefficients lie in memory at full size.
MAX_JPEG_PIXELS = 2**28
# A progressive JPEG of a few kilobytes can ask for thousands of passes over a large picture; real ones have about ten.
MAX_SCANS = 100
# Formats that Pillow decodes by itself from memory; EPS, PDF or WMF would start other programs.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "JPEG2000", "AVIF", "ICO", "CUR", "ICNS"),
    *("PPM", "TGA", "PSD", "DDS", "PCX", "DCX", "SGI", "SUN", "QOI", "XBM", "XPM", "MSP", "IM", "FITS", "BLP", "FTEX"),
)
JPEG_FORMATS = ("JPEG", "MPO")
JPEG_START = b"\xff\xd8\xff"
# Their files often have a fourth channel that nobody filled: zero everywhere does not mean invisible.
FORMATS_WITH_IDLE_ALPHA = ("TGA", "BMP", "DIB")
FULL_SCALES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # of sensors
WIDE_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
ORIENTATION_TAG = 0x0112
PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
HEADERS_WITH_EXIF = {"exif", "xmp"}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TooLarge(ValueError):
    """A picture that asks for more memory or time than any should: refused by its header, before it is decoded."""


def decode_rgb(data: bytes, min_side: int | None = None) -> Image.Image:
    """Decode a picture to upright RGB, transparency over white.

    With `min_side` (pixels) a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as both sides keep at least
    that many pixels: much faster. Raises ValueError with the reason for whatever does not decode whole.
    """
    picture = open_picture(data)
    shrink = 1 if min_side is None else largest_shrink(min(picture.size), min_side)
    return load_rgb(picture, shrink)


def open_picture(data: bytes) -> ImageFile.ImageFile:
    """Read the header only and check the limits; pixels follow in `load_rgb`. Raises ValueError with the reason."""
    silence_pillow()
    if not data:
        raise ValueError("picture is empty: a file of 0 bytes")
    try:
        picture = read_header(data)
    except Image.DecompressionBombError as error:
        raise TooLarge(reason_of(error)) from None
    except Exception as error:
        raise ValueError(reason_of(error)) from None
    width, height = picture.size
    if width * height > max_pixels(picture):
        kind = picture.format + (" that is progressive" if "progressive" in picture.info else "")
        raise TooLarge(
            f"picture of {width}x{height} pixels is over the limit of {max_pixels(picture):,} pixels for {kind}"
        )
    if picture.format in JPEG_FORMATS and (num_scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise TooLarge(f"JPEG with {num_scans} scans is over the limit of {MAX_SCANS}")
    return picture


def read_header(data: bytes) -> ImageFile.ImageFile:
    """Open a picture with Pillow, whose own limit is meant for whole decoding, which a large JPEG does not need."""
    try:
        return Image.open(io.BytesIO(data), formats=known_formats())
    except Image.DecompressionBombError:
        if not data.startswith(JPEG_START):
            raise
        return JpegImageFile(io.BytesIO(data))


def max_pixels(picture: ImageFile.ImageFile) -> int:
    """Return how many pixels a picture may have: more where the decoder can make it smaller on the way."""
    scales = picture.format in JPEG_FORMATS and "progressive" not in picture.info
    return MAX_JPEG_PIXELS if scales else MAX_PIXELS


@cache
def known_formats() -> tuple[str, ...]:
    """Load Pillow's plugins once per process, and keep Pillow and libtiff from writing complaints to stderr."""
    Image.init()
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    try:
        tiff = ctypes.CDLL(Image.core.__file__)
        tiff.TIFFSetErrorHandler(None)
        tiff.TIFFSetWarningHandler(None)
    except (OSError, AttributeError):
        pass  # a Pillow without libtiff, or one that hides it: nothing to silence
    return tuple(name for name in FORMATS if name in Image.OPEN)


def upright_size(picture: ImageFile.ImageFile) -> tuple[int, int]:
    """Tell width and height as they will be once the picture is upright: from the header of a JPEG, else decoded."""
    if picture.format not in JPEG_FORMATS:
        load_pixels(picture)
    width, height = picture.size
    return (height, width) if orientation(picture) >= 5 else (width, height)


def largest_shrink(side: float, min_side: int) -> int:
    """Return the largest of 8, 4, 2, 1 by which `side` can be divided and still hold `min_side` pixels."""
    return next((shrink for shrink in (8, 4, 2) if side >= shrink * min_side), 1)


def load_rgb(picture: ImageFile.ImageFile, shrink: int = 1) -> Image.Image:
    """Decode an opened picture to upright RGB; a JPEG at 1/shrink of its size (1, 2, 4 or 8), rounded up.

    A JPEG of more than MAX_PIXELS is made smaller in any case.
    """
    while picture.width * picture.height > MAX_PIXELS * shrink**2:
        shrink *= 2
    if shrink > 1 and picture.format in JPEG_FORMATS:
        picture.draft(None, tuple(max(side // shrink, 1) for side in picture.size))
    load_pixels(picture)
    turn = TURNS.get(orientation(picture))
    try:
        rgb = to_rgb(picture)
        return rgb.transpose(turn) if turn is not None else rgb
    except Exception as error:
        raise ValueError(reason_of(error)) from None


def load_pixels(picture: ImageFile.ImageFile) -> None:
    """Decode in place, once; ValueError with the reason when the file is damaged or cut off."""
    try:
        picture.load()
    except Exception as error:
        raise ValueError(reason_of(error)) from None


def orientation(picture: ImageFile.ImageFile) -> int:
    """Read the EXIF orientation, 1 to 8; 1 (upright) for anything else, since broken EXIF is no broken picture."""
    # Pillow turns TIFFs by itself. The EXIF of most pictures is absent: not asking is worth 20 microseconds each.
    if picture.format == "TIFF" or (picture.format in JPEG_FORMATS and not HEADERS_WITH_EXIF & picture.info.keys()):
        return 1
    try:
        value = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if value in TURNS else 1


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB, transparency over white."""
    if picture.mode in WIDE_MODES:
        return wide_to_rgb(picture)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        if picture.format in FORMATS_WITH_IDLE_ALPHA and rgba.getextrema()[3] == (0, 0):
            return rgba.convert("RGB")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def wide_to_rgb(picture: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits; white is the smallest usual full scale that holds the largest value.

    Black is 0, or the smallest value where some are negative.
    """
    values = np.nan_to_num(np.asarray(picture).astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    smallest, largest = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    full_scales = FULL_SCALES if picture.mode != "F" else (1, *FULL_SCALES)
    white = next((full for full in full_scales if largest <= full and smallest == 0), largest)
    grey = (values - smallest) * (255 / max(white - smallest, 1e-30))
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")


def silence_pillow() -> None:
    """Ignore Pillow's warnings about odd files, and leave it so: undoing it is not safe with threads before 3.14."""
    if PILLOW_FILTER not in warnings.filters[:1]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def reason_of(error: Exception) -> str:
    """Put what Pillow raised into one short line that says the same at every run."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture in a known format"  # Pillow's text holds a memory address
    if isinstance(error, Image.DecompressionBombError):
        return f"picture is over the limit of {MAX_PIXELS:,} pixels"
    text = " ".join(str(error).split())[:200]
    if re.fullmatch(r"-?\d+", text):
        text = f"decoder error {text}"  # all that Pillow 11 says
    return f"picture does not decode: {text or type(error).__name__}"
