"""What becomes of a picture's bytes: kept where they are plain, else encoded anew, upright, in RGB over white."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image
from test_pack import encoded, noise

from softmoe_clip.data_pipelines.picture_bytes import Encoding, for_shard


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_pictures_keep_their_bytes(format, mode):
    data = encoded(noise().convert(mode), format)
    picture = for_shard(data)
    assert picture.data == data
    assert (picture.extension, picture.width, picture.height) == ({"JPEG": "jpg"}.get(format, format.lower()), 16, 12)


@pytest.mark.parametrize(
    ("format", "extension"), [("BMP", "png"), ("TIFF", "png"), ("PPM", "png"), ("AVIF", "jpg"), ("JPEG2000", "jpg")]
)
def test_plain_pictures_in_other_formats_become_png_and_lossy_ones_jpeg(format, extension):
    assert for_shard(encoded(noise(), format)).extension == extension


def with_white(image, place):
    image = image.copy()
    image.putpixel(place, (255, 255, 255))
    return image


def test_other_pictures_are_encoded_anew_upright_in_rgb_over_white():
    image = noise()
    rgba = image.convert("RGBA")
    rgba.putalpha(0)
    grey16 = Image.fromarray(np.linspace(0, 65535, 192).reshape(12, 16).astype(np.uint16))
    jpeg = Image.open(io.BytesIO(encoded(image, "JPEG")))
    cases = {
        "turned": (encoded(image, "PNG", exif=exif(6)), image.transpose(Image.Transpose.ROTATE_270), 0),
        "turned jpeg": (encoded(image, "JPEG", exif=exif(3)), jpeg.transpose(Image.Transpose.ROTATE_180), 40),
        "palette": (encoded(image.convert("P")), image.convert("P").convert("RGB"), 0),
        "transparent": (encoded(rgba), Image.new("RGB", (16, 12), "white"), 0),
        "one transparent colour": (encoded(image, transparency=image.getpixel((3, 4))), with_white(image, (3, 4)), 0),
        "16 bits": (encoded(grey16), Image.fromarray(np.linspace(0, 255, 192).reshape(12, 16).astype(np.uint8)), 1),
        "CMYK": (encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"), Image.new("RGB", (9, 9), "red"), 3),
        "BMP": (encoded(image, "BMP"), image, 0),
        "GIF": (
            encoded(image, "GIF", save_all=True, append_images=[noise(seed=1)]),
            image.quantize().convert("RGB"),
            60,
        ),
    }
    for name, (data, expected, tolerance) in cases.items():
        picture = for_shard(data)
        result = Image.open(io.BytesIO(picture.data))
        assert picture.data != data, name
        assert (result.mode, result.size, result.getexif().get(0x0112, 1)) == ("RGB", expected.size, 1), name
        assert (picture.width, picture.height) == result.size, name
        assert result.format == ("JPEG" if picture.extension == "jpg" else "PNG"), name
        difference = np.abs(np.asarray(result, int) - np.asarray(expected.convert("RGB"), int)).max()
        assert difference <= tolerance, (name, difference)


def test_a_damaged_png_is_refused_although_its_exif_is_asked_for_first():
    data = bytearray(encoded(noise((64, 64))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="does not decode"):
        for_shard(bytes(data))


def gradient(width, height):
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, (x + y) / 2], -1).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (341, 256)), ((480, 640), (256, 341)), ((256, 900), (256, 900)), ((100, 50), (100, 50))],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_the_shorter_side_shrinks_and_never_grows(format, size, expected):
    data = encoded(gradient(*size), format)
    picture = for_shard(data, Encoding(shorter_side=256))
    result = Image.open(io.BytesIO(picture.data))
    assert result.size == (picture.width, picture.height) == expected
    assert (picture.original_width, picture.original_height) == size
    assert (picture.data == data) == (size == expected)
    assert result.format == format
    difference = np.abs(np.asarray(result, int) - np.asarray(gradient(*expected), int))
    assert difference.mean() < 1.5


def test_shrinking_is_as_good_as_a_full_decode_with_lanczos():
    smooth = noise((500, 400)).resize((2000, 1600), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    slow = Image.open(io.BytesIO(data)).resize((250, 200), Image.Resampling.LANCZOS)
    fast = Image.open(io.BytesIO(for_shard(data, Encoding("png", shorter_side=200)).data))
    assert np.abs(np.asarray(fast, int) - np.asarray(slow, int)).mean() < 3


def test_a_turned_picture_is_shrunk_upright():
    picture = for_shard(encoded(gradient(400, 200), "JPEG", exif=exif(6)), Encoding(shorter_side=100))
    assert (picture.width, picture.height) == (100, 200)
    assert (picture.original_width, picture.original_height) == (200, 400)
    assert '"Orientation": "6"' in picture.exif


@pytest.mark.parametrize(("encode", "format"), [("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_everything_is_encoded_anew_if_asked(encode, format):
    for source in ("JPEG", "PNG", "WEBP"):
        data = encoded(gradient(64, 48), source)
        picture = for_shard(data, Encoding(encode))
        result = Image.open(io.BytesIO(picture.data))
        assert (result.format, result.mode, result.size) == (format, "RGB", (64, 48))
        assert picture.extension == {"jpeg": "jpg"}.get(encode, encode)
        assert np.abs(np.asarray(result, int) - np.asarray(gradient(64, 48), int)).mean() < 4
        assert picture.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("encode", ["jpeg", "webp"])
def test_less_quality_is_fewer_bytes(encode):
    data = encoded(noise((64, 48)), "PNG")
    sizes = [len(for_shard(data, Encoding(encode, quality)).data) for quality in (20, 60, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"encode": "gif"}, "encode is 'gif': choose keep, jpeg, png or webp"),
        ({"encode": "png", "quality": 90}, "PNG has no quality"),
        ({"encode": "jpeg", "quality": 101}, "quality is 101: choose 1 to 100"),
        ({"shorter_side": 0}, "shorter_side is 0"),
    ],
)
def test_settings_that_can_not_be_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Encoding(**settings)


def test_a_picture_too_long_for_webp_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="does not encode"):
        for_shard(encoded(Image.new("RGB", (17_000, 2))), Encoding("webp"))
