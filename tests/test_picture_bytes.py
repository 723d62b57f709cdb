"""What becomes of a picture's bytes: kept where they are plain, else encoded anew, upright, in RGB over white."""

import io

import numpy as np
import pytest
from PIL import Image
from test_pack import encoded, noise

from softmoe_clip.data_pipelines.picture_bytes import for_shard


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
