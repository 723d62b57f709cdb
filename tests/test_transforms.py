"""The training crop: a pure function of its generator, unbiased, quick; the evaluation transform: open_clip's."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from softmoe_clip.data_pipelines.transforms import (
    Augment,
    decode_crop,
    draw_box,
    draw_crop,
    eval_transform,
    normalise,
    resized_crop,
)


def train_crop(image, image_size, augment, rng):
    """What `decode_crop` must give, from a picture that is decoded as a whole."""
    return resized_crop(image, draw_crop(*image.size, image_size, augment, rng), image_size)


def smooth(width: int, height: int) -> Image.Image:
    """Red grows to the right, green grows down: a crop's place can be read from its pixels."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(200, 200), (640, 300), (97, 351), (1, 1), (1, 500), (3000, 2)])
def test_crops_are_uint8_planes_drawn_from_the_generator_alone(size):
    picture, augment = smooth(*size), Augment(flip=True)
    state = torch.get_rng_state()
    crops = [train_crop(picture, 32, augment, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert all(crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 and crop.is_contiguous() for crop in crops)
    assert torch.equal(crops[0], crops[1])
    assert min(size) <= 2 or not torch.equal(crops[0], crops[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_wide_crops_are_as_frequent_as_tall_ones():
    rng, augment = np.random.default_rng(0), Augment(crop_scale=(0.05, 0.1))  # small enough that no draw is refused
    boxes = [draw_box(4000, 4000, augment, rng) for _ in range(5000)]
    assert np.mean([math.log(width / height) for _, _, width, height in boxes]) == pytest.approx(0, abs=0.01)


def test_scaled_decoding_crops_the_same_place():
    for seed in range(30):
        picture = smooth(403, 301)
        data = encoded(picture, "JPEG", quality=98, subsampling=0)
        quick = decode_crop(data, 32, Augment(flip=True), np.random.default_rng(seed)).int()
        slow = train_crop(picture, 32, Augment(flip=True), np.random.default_rng(seed)).int()
        assert (quick[:2] - slow[:2]).abs().max() <= 4


def test_pictures_stored_turned_are_cropped_upright():
    picture, exif = smooth(300, 200), Image.Exif()
    exif[0x0112] = 6
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    for kind, options in {"JPEG": {"quality": 98, "subsampling": 0}, "PNG": {}, "TIFF": {}}.items():
        data = encoded(turned, kind, exif=exif, **options)
        quick = decode_crop(data, 32, Augment(), np.random.default_rng(3)).int()
        assert (quick[:2] - train_crop(picture, 32, Augment(), np.random.default_rng(3)).int()[:2]).abs().max() <= 4


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Noise whose waves are as strong as they are long, which is the spectrum of photographs."""
    across, down = np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height))
    strength = 1 / np.maximum(np.hypot(across, down), 1 / width) ** 1.2
    waves = np.fft.fft2(np.random.default_rng(seed).standard_normal((3, height, width))) * strength
    planes = np.fft.ifft2(waves).real
    return Image.fromarray((128 + 50 * planes / planes.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


@pytest.mark.parametrize("image_size", [224, 64])
@pytest.mark.parametrize("crop_scale", [(0.05, 1.0), (0.9, 1.0)])
def test_quick_crops_of_jpegs_differ_little_from_pillows_resizing_of_the_whole_picture(image_size, crop_scale):
    augment, differences = Augment(crop_scale=crop_scale), []
    for seed in range(12):
        data = encoded(photograph(640, 480, seed), "JPEG", quality=90)
        quick = decode_crop(data, image_size, augment, np.random.default_rng(seed)).int()
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        crop = draw_crop(640, 480, image_size, augment, np.random.default_rng(seed))
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        slow = whole.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
        differences.append((quick - torch.from_numpy(np.array(slow)).permute(2, 0, 1)).abs().float().mean())
    assert np.mean(differences) < 3


@pytest.mark.parametrize("side", [33, 64, 100, 255, 256, 1000])
def test_boxes_move_by_less_than_a_pixel_of_the_result(side):
    for seed in range(50):
        crop = draw_crop(side, side, 32, Augment(), np.random.default_rng(seed))
        drawn = draw_box(side, side, Augment(), np.random.default_rng(seed))
        assert not any(pixels % crop.shrink for pixels in crop[:4])
        assert all(0 <= there - here < crop.shrink for there, here in zip(drawn, crop[:4], strict=True))
        assert crop.shrink == 1 or min(crop.width, crop.height) >= 32 * crop.shrink


def test_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    augment = Augment(crop_scale=(0.2, 0.8))
    ours = [draw_crop(400, 300, 400, augment, np.random.default_rng(seed))[:4] for seed in range(2000)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        picture = torch.empty(3, 300, 400)
        theirs = [RandomResizedCrop.get_params(picture, (0.2, 0.8), (3 / 4, 4 / 3)) for _ in range(2000)]
    left, top, width, height = np.array(ours).T
    assert set(width * height / 120_000 < 0.199) == set(width * height / 120_000 > 0.801) == {False}
    assert left.min() == top.min() == 0
    assert (left + width).max() == 400
    assert (top + height).max() == 300
    their_top, their_left, their_height, their_width = np.array(theirs).T
    pairs = ((left, their_left), (top, their_top), (width, their_width), (height, their_height))
    for mine, other in pairs:
        assert abs(mine.mean() - other.mean()) < 5 * other.std() * np.sqrt(2 / 2000)
        assert abs(mine.std() / other.std() - 1) < 0.1


def test_half_of_the_pictures_are_mirrored_where_asked():
    flips = [draw_crop(10, 10, 10, Augment(flip=True), np.random.default_rng(seed)).flip for seed in range(1000)]
    assert 430 < sum(flips) < 570
    picture = smooth(100, 100)
    mirrored = next(seed for seed, flip in enumerate(flips) if flip)
    crop = train_crop(picture, 16, Augment(flip=True), np.random.default_rng(mirrored)).int()
    assert crop[0, 0, 0] > crop[0, 0, -1]


def test_crops_are_antialiased():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8))
    whole = Augment(crop_scale=(0.99, 1.0), crop_ratio=(1.0, 1.0))
    assert train_crop(noise, 20, whole, np.random.default_rng(0)).float().std() < 10


def test_damaged_pictures_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="truncated"):
        decode_crop(encoded(smooth(100, 100), "JPEG")[:-50], 16, Augment(), np.random.default_rng(0))


def test_the_evaluation_transform_is_open_clips():
    from open_clip.transform import image_transform

    picture, cfg = smooth(123, 77), {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "interpolation": "bicubic"}
    expected = image_transform(64, is_train=False, mean=cfg["mean"], std=cfg["std"], interpolation="bicubic")(picture)
    assert torch.equal(eval_transform(cfg, 64)(picture), expected)
    assert torch.equal(eval_transform({**cfg, "size": 64}, 32)(picture), expected)
    with pytest.raises(ValueError, match="names no size"):
        eval_transform(cfg)
    with pytest.raises(ValueError, match="unknown key men"):
        eval_transform({"men": 1, "size": 64})


def test_training_pixels_are_normalised_as_evaluation_pixels_are():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    torch.testing.assert_close(
        normalise(pixels, mean, std)[0], eval_transform({"size": 16, "mean": mean, "std": std})(picture)
    )
    assert math.isclose(normalise(pixels, mean, std).min(), -2.0, abs_tol=1e-6)
