"""From picture bytes to pixels: the random crop of training, all drawn from one generator; open_clip's transform."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from softmoe_clip.data_pipelines.images import largest_shrink, load_rgb, open_picture, upright_size

NUM_CROP_DRAWS = 10


@dataclass(frozen=True)
class Augment:
    """The inception crop: a share of the picture's area, an aspect ratio (width / height), and maybe a mirror."""

    crop_scale: tuple[float, float] = (0.05, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False


class Crop(NamedTuple):
    """A box in pixels of the upright picture, and whether to mirror it."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


def train_crop(
    image: Image.Image, image_size: int, augment: Augment, rng: np.random.Generator
) -> UInt8[Tensor, "3 {image_size} {image_size}"]:
    """Crop a decoded RGB picture at random and resize the crop; all draws come from `rng`."""
    return resized_crop(image, draw_crop(*image.size, augment, rng), image.size, image_size)


def decode_crop(
    data: bytes, image_size: int, augment: Augment, rng: np.random.Generator
) -> UInt8[Tensor, "3 {image_size} {image_size}"]:
    """Do the same from a picture's bytes, decoding a JPEG no larger than the crop needs: two to four times as fast.

    Raises ValueError with the reason when the picture does not decode.
    """
    picture = open_picture(data)
    size = upright_size(picture)
    crop = draw_crop(*size, augment, rng)
    image = load_rgb(picture, largest_shrink(min(crop.width, crop.height), image_size))
    return resized_crop(image, crop, size, image_size)


def draw_crop(width: int, height: int, augment: Augment, rng: np.random.Generator) -> Crop:
    """Draw a box as torchvision's RandomResizedCrop does: ten tries, then the largest centred box of a fair ratio."""
    flip = augment.flip and rng.random() < 0.5
    low, high = np.log(augment.crop_ratio)
    for _ in range(NUM_CROP_DRAWS):
        area = width * height * rng.uniform(*augment.crop_scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h, flip)
    w = min(width, max(1, round(height * augment.crop_ratio[1])))
    h = min(height, max(1, round(width / augment.crop_ratio[0])))
    return Crop((width - w) // 2, (height - h) // 2, w, h, flip)


def resized_crop(
    image: Image.Image, crop: Crop, size: tuple[int, int], image_size: int
) -> UInt8[Tensor, "3 {image_size} {image_size}"]:
    """Cut out `crop`, given in a picture of `size`, from `image`, which may be a scaled version of it; and resize."""
    across, down = image.width / size[0], image.height / size[1]
    box = (
        crop.left * across,
        crop.top * down,
        # A scaled picture is rounded up, so the product can pass its edge by a rounding error.
        min((crop.left + crop.width) * across, image.width),
        min((crop.top + crop.height) * down, image.height),
    )
    # The gap lets Pillow average whole pixels first where the crop is many times larger than the result.
    resized = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    pixels = np.asarray(resized)
    return torch.from_numpy(np.ascontiguousarray((pixels[:, ::-1] if crop.flip else pixels).transpose(2, 0, 1)))


def normalise(
    images: UInt8[Tensor, "b 3 y x"] | Float[Tensor, "b ..."], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b ..."]:
    """Turn pixels into what the towers take, on the device the batch is on; floats are that already."""
    if images.is_floating_point():
        return images
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (mean, std))
    return (images / 255 - mean) / std


def eval_transform(
    preprocess_cfg: dict, image_size: int | None = None
) -> Callable[[Image.Image], Float[Tensor, "3 y x"]]:
    """Build open_clip's own evaluation transform from a model's `preprocess_cfg`; `image_size` if that has no size."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    known = PreprocessCfg.__dataclass_fields__
    settings = {name: value for name, value in preprocess_cfg.items() if name in known and value is not None}
    if unknown := preprocess_cfg.keys() - known.keys():
        raise ValueError(f"preprocess_cfg has the unknown key {min(unknown)}; known are {', '.join(known)}")
    if image_size is not None:
        settings.setdefault("size", image_size)
    if "size" not in settings:
        raise ValueError("preprocess_cfg names no size: give the model's image size")
    return image_transform_v2(PreprocessCfg(**settings), is_train=False)
