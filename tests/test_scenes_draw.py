"""Drawn things: every colour, shape and texture can be told from every other."""

from itertools import combinations, product

import numpy as np
import pytest

from softmoe_clip.data_pipelines.scenes_draw import OUTLINES, PALETTE, draw
from softmoe_clip.data_pipelines.scenes_grammar import COLOURS, SHAPES, TEXTURES, Scene, Thing

# On linear RGB, severity 1: Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color
# Vision Deficiency", 2009.
VISION = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def test_a_thing_has_its_colour_on_a_grey_ground_at_any_picture_size():
    for colour, image_size in product(COLOURS, (32, 64, 224)):
        scene = Scene("single", (Thing("plain", colour, "square", 0.5, 0.5, 0.5),), (0,))
        pixels = np.asarray(draw(scene, image_size)).astype(int)
        assert pixels.shape == (image_size, image_size, 3)
        middle = pixels[image_size // 2, image_size // 2]
        assert min(COLOURS, key=lambda name: np.abs(PALETTE[name][0] - middle).sum()) == colour
        assert np.ptp(pixels[:2, :2], axis=2).max() < 16
        assert pixels[0, 0].min() > 150  # dark things need a light background


def test_shapes_look_different_and_so_do_textures():
    def look(texture: str, shape: str) -> np.ndarray:
        return np.asarray(draw(Scene("single", (Thing(texture, "blue", shape, 0.5, 0.5, 0.5),), (0,)))).astype(float)

    assert set(OUTLINES) == set(SHAPES)
    assert set(PALETTE) == set(COLOURS)
    for one, other in combinations(SHAPES, 2):
        assert share_of_other_pixels(look("plain", one), look("plain", other)) > 0.03, (one, other)
    for one, other in combinations(TEXTURES, 2):
        assert share_of_other_pixels(look(one, "circle"), look(other, "circle")) > 0.03, (one, other)


def share_of_other_pixels(one: np.ndarray, other: np.ndarray) -> float:
    return (np.abs(one - other).max(axis=2) > 60).mean()


@pytest.mark.parametrize(("vision", "least"), [("full", 30), ("protanopia", 10), ("deuteranopia", 15)])
def test_colours_stay_apart_also_with_a_colour_vision_deficiency(vision, least):
    seen = [cielab(np.array(PALETTE[name][0]), np.array(VISION[vision])) for name in COLOURS]
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > least


def cielab(rgb: np.ndarray, vision: np.ndarray) -> np.ndarray:
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(vision @ linear, 0, 1) / (0.9505, 1, 1.089)
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
