"""Routing weights drawn over pictures: where a slot looks, and which expert leads where."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from softmoe_clip.report.router_maps import LayerMaps, layer_title, router_maps, telling_slots

# Told apart by people with any colour vision (after Okabe and Ito), softened for use over photographs.
EXPERT_COLOURS = ("#e69f00", "#56b4e9", "#1fa37c", "#e6d84a", "#d5703f", "#cc79a7")
FULL_HEAT = 1.5  # times the even share: the least that glows fully


def model_view(picture: Image.Image, transform, side: int) -> Image.Image:
    """Cut a picture as the model's transform does, but at `side` pixels instead of the model's resolution."""
    steps = getattr(transform, "transforms", ())
    sizes = [step.size if isinstance(step.size, int) else min(step.size) for step in steps if hasattr(step, "size")]
    picture = picture.convert("RGB")
    for step in (step for step in steps if hasattr(step, "size")):
        step = copy(step)
        step.size = scaled_size(step.size, side / min(sizes))
        picture = step(picture)
    return picture if sizes else picture.resize((side, side), Image.Resampling.BICUBIC)


def scaled_size(size, factor: float):
    """Scale the size of a transform step, which is one number or a pair."""
    return round(size * factor) if isinstance(size, int) else tuple(round(side * factor) for side in size)


def times_even(weights: np.ndarray) -> float:
    """How many times the greatest weight of one map is above the even share of a patch."""
    return float(weights.max() * weights.size / max(weights.sum(), 1e-12))


def heat_of(weights: np.ndarray) -> np.ndarray:
    """Scale a map to 0..1: 0 at the even share and below, 1 at its greatest weight.

    The scale never ends below FULL_HEAT times the even share, so that a nearly even map looks nearly even.
    """
    even = weights.sum() / weights.size
    top = max(float(weights.max()), FULL_HEAT * even) - even
    return np.clip((weights - even) / max(top, 1e-12), 0, 1).astype(np.float32)


def overlay(picture: Image.Image, weights: np.ndarray) -> Image.Image:
    """Draw one map (y, x) over a picture: dark where a slot looks no more than evenly, glowing elsewhere."""
    heat = Image.fromarray(heat_of(weights)).resize(picture.size, Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(heat), 0, 1)[..., None]
    pixels, grey = colour_and_grey(picture)
    night = grey * np.array([0.31, 0.34, 0.43]) + np.array([0.03, 0.03, 0.06])
    glow = pixels * 0.62 + grey * 0.12 + np.array([0.36, 0.17, 0.0]) * heat
    return from_unit(night * (1 - heat) + glow * heat)


def leaders(maps: LayerMaps) -> tuple[np.ndarray, list[int]]:
    """Tell the expert with the greatest combine weight at each patch (b, y, x), and those that lead most often."""
    leader = maps.combine.argmax(1)
    often = np.bincount(leader.ravel(), minlength=maps.combine.shape[1])
    return leader, [int(expert) for expert in np.argsort(-often, kind="stable")[: len(EXPERT_COLOURS)] if often[expert]]


def leader_overlay(picture: Image.Image, leader: np.ndarray, named: Sequence[int]) -> Image.Image:
    """Colour each patch of a picture by its leading expert; experts that are not named stay grey."""
    colours = np.full((*leader.shape, 3), 150, dtype=np.uint8)
    for expert, colour in zip(named, EXPERT_COLOURS, strict=False):
        colours[leader == expert] = tuple(bytes.fromhex(colour[1:]))
    blocks = Image.fromarray(colours).resize(picture.size, Image.Resampling.NEAREST)
    _, grey = colour_and_grey(picture)
    tint = np.asarray(blocks, dtype=np.float32) / 255
    return from_unit(tint * (0.30 + 0.45 * grey) + 0.22 * grey)


def colour_and_grey(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """A picture as floats in 0..1, (y, x, 3) in colour and (y, x, 1) in grey."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) / 255
    return pixels, (pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]


def from_unit(pixels: np.ndarray) -> Image.Image:
    """Turn floats in 0..1 into a picture."""
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))


def draw_router_maps(
    loaded, images: Sequence[Image.Image], out_png: str | Path, num_slots: int = 5, side: int = 168
) -> Path:
    """Draw one sheet: per Soft MoE layer a row for each picture: what some slots take in of it, and who leads.

    `loaded` is a LoadedModel. A tower without Soft MoE layers raises ValueError.
    """
    layers = router_maps(loaded.model, images, loaded.transform)
    if not layers:
        raise ValueError(
            "this model's image tower holds no Soft MoE layer, so there are no router maps to draw "
            "(a sparse layer has no slots that mix tokens)"
        )
    views = [model_view(image, loaded.transform, side) for image in images]
    gap, head = 10, 54
    columns = min(num_slots, layers[0].dispatch.shape[1] * layers[0].dispatch.shape[2]) + 2
    height = head + len(views) * (side + gap)
    sheet = Image.new("RGB", (columns * (side + gap) + 3 * gap, len(layers) * height + 2 * gap), "#fbfaf7")
    for i, maps in enumerate(layers):
        draw_layer(sheet, maps, views, (2 * gap, i * height + gap), num_slots, side, gap, head)
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_png, format="PNG")
    return Path(out_png)


def draw_layer(sheet, maps: LayerMaps, views, corner: tuple[int, int], num_slots: int, side: int, gap: int, head: int):
    """Draw the rows of one layer, with the column titles above."""
    draw, (x, y), step = ImageDraw.Draw(sheet), corner, side + gap
    slots = telling_slots(maps, num_slots)
    leader, named = leaders(maps)
    large, small = ImageFont.load_default(size=19), ImageFont.load_default(size=13)
    draw.text((x, y + 24), layer_title(maps.layer), fill="#1d1b19", font=large)
    for column, (expert, slot) in enumerate(slots, start=1):
        draw.text((x + column * step, y + 30), f"expert {expert}, slot {slot}", fill="#6d675f", font=small)
    draw.text((x + (len(slots) + 1) * step, y + 30), "leading experts", fill="#6d675f", font=small)
    for row, view in enumerate(views):
        cells = [view, *(overlay(view, maps.dispatch[row, expert, slot]) for expert, slot in slots)]
        cells.append(leader_overlay(view, leader[row], named))
        for column, cell in enumerate(cells):
            sheet.paste(cell, (x + column * step, y + head + row * step))
