"""From picture bytes to pixels: the random crop of training, all drawn from one generator; open_clip's transform."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from softmoe_clip.data_pipelines.images import largest_shrink, load_rgb, open_picture, upright_size

NUM_CROP_DRAWS = 10


@dataclass(frozen=True)
class Augment:
    """The inception crop: a share of the picture's area, an aspect ratio (width / height), and maybe a mirror."""

    crop_scale: tuple[float, float] = (0.05, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False


class Crop(NamedTuple):
    """A box in pixels of the upright picture, whether to mirror it, and how much smaller the picture may be decoded.

    The box stands on the pixels of the picture at 1/shrink of its size.
    """

    left: int
    top: int
    width: int
    height: int
    flip: bool
    shrink: int


def decode_crop(
    data: bytes, image_size: int, augment: Augment, rng: np.random.Generator
) -> UInt8[Tensor, "3 {image_size} {image_size}"]:
    """Crop an encoded picture at random and resize the crop; all draws come from `rng`.

    A JPEG is decoded no larger than the crop needs, which is two to four times as fast as the whole of it.
    Raises ValueError with the reason when the picture does not decode.
    """
    picture = open_picture(data)
    size = upright_size(picture)
    crop = draw_crop(*size, image_size, augment, rng)
    image = load_rgb(picture, crop.shrink)
    if image.size != size:
        crop = Crop(*(pixels // crop.shrink for pixels in crop[:4]), crop.flip, shrink=1)
    return resized_crop(image, crop, image_size)


def draw_crop(width: int, height: int, image_size: int, augment: Augment, rng: np.random.Generator) -> Crop:
    """Draw a box as torchvision's RandomResizedCrop does: ten tries, then the largest centred box of a fair ratio.

    Then move it, by less than one pixel of the result, to where a picture of 1/2, 1/4 or 1/8 of the size has pixels:
    the smallest one in which the box still holds `image_size` of them.
    """
    flip = augment.flip and rng.random() < 0.5
    box = draw_box(width, height, augment, rng)
    shrink = largest_shrink(min(box[2:]), image_size)
    return Crop(*(pixels - pixels % shrink for pixels in box), flip, shrink)


def draw_box(width: int, height: int, augment: Augment, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw left, top, width and height of the inception crop."""
    low, high = np.log(augment.crop_ratio)
    for _ in range(NUM_CROP_DRAWS):
        area = width * height * rng.uniform(*augment.crop_scale)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w = min(width, max(1, round(height * augment.crop_ratio[1])))
    h = min(height, max(1, round(width / augment.crop_ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def resized_crop(image: Image.Image, crop: Crop, image_size: int) -> UInt8[Tensor, "3 {image_size} {image_size}"]:
    """Cut `crop` out of an RGB picture and resize it, antialiased; torch's kernel for bytes is four times as fast."""
    box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
    pixels = torch.from_numpy(np.array(image.crop(box))).permute(2, 0, 1)[None]
    resized = interpolate(pixels, (image_size, image_size), mode="bicubic", antialias=True)[0]
    return (resized.flip(-1) if crop.flip else resized).contiguous()


def normalise(
    images: UInt8[Tensor, "b 3 y x"] | Float[Tensor, "b ..."], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b ..."]:
    """Turn pixels into what the towers take, on the device the batch is on; floats are that already."""
    if images.is_floating_point():
        return images
    return standardise(images, mean, std)


def standardise(
    pixels: Shaped[Tensor, "b 3 y x"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b 3 y x"]:
    """Take 0..255 to 0..1, subtract the mean and divide by the standard deviation of each plane."""
    mean, std = (per_plane(values, pixels.device) for values in (mean, std))
    return (pixels / 255 - mean) / std


def per_plane(values: Sequence[float], device: torch.device) -> Float[Tensor, "3 1 1"]:
    """Put three numbers on a device, without waiting until all is computed there that was asked before."""
    return torch.tensor(values).view(3, 1, 1).to(device, non_blocking=True)


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
