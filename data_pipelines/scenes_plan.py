"""Plan what a drawn scene holds and where it stands; a fifth of all combinations is for held-out scenes alone."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.scenes_grammar import (
    COLOURS,
    COMMON_TEXTURES,
    RARE_TEXTURES,
    SHAPES,
    TEXTURES,
    Arrangement,
    Scene,
    Thing,
)

ARRANGEMENTS: dict[int, tuple[Arrangement, ...]] = {
    1: ("single",),
    2: ("row", "column", "stack"),
    3: ("row", "column", "pyramid"),
}
# A run of minutes learns four textures well, but not seven: three of them are rare.
RARE_SHARE = 0.06
MOST_EQUAL = 4  # how many equal things a scene holds at most

MARGIN = 0.022
GAP = 0.022


class Sample(NamedTuple):
    """A planned scene with all that is written beside its picture."""

    scene: Scene
    captions: tuple[str, ...]
    extra: dict
    label: int | None = None


def is_unseen(texture: str, colour: str, shape: str) -> bool:
    """True for combinations that training never shows, for any seed: a fifth, spread evenly over all pairs.

    Who knows only two of the three still has to choose: mostly between two shapes, always between two colours.
    """
    return (TEXTURES.index(texture) + COLOURS.index(colour) + SHAPES.index(shape)) % 5 == 0


def unseen_names(textures: Sequence[str]) -> list[str]:
    """List the zero-shot classes, the unseen combinations with these textures: "striped red star"."""
    return [
        f"{texture} {colour} {shape}"
        for texture, colour, shape in product(textures, COLOURS, SHAPES)
        if is_unseen(texture, colour, shape)
    ]


def draw_scene(rng: np.random.Generator, scene_seed: tuple[int, ...], unseen: Sequence[bool]) -> Scene:
    """Draw what is to be seen; `unseen` says of each object whether it is one that training never shows."""
    arrangements = ARRANGEMENTS[len(unseen)]
    arrangement = arrangements[int(rng.integers(len(arrangements)))]
    return arrange(draw_names(rng, unseen), arrangement, rng, scene_seed)


def draw_names(rng: np.random.Generator, unseen: Sequence[bool]) -> list[tuple[str, str, str]]:
    """Draw as many different (texture, colour, shape); some textures are rare, plain is frequent among several."""
    names: list[tuple[str, str, str]] = []
    pairs = set()
    while len(names) < len(unseen):
        texture = TEXTURES[0] if len(unseen) > 1 and rng.random() < 0.3 else draw_texture(rng)
        pair = COLOURS[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(len(SHAPES)))]
        if is_unseen(texture, *pair) == bool(unseen[len(names)]) and pair not in pairs:
            pairs.add(pair)
            names.append((texture, *pair))
    return names


def draw_texture(rng: np.random.Generator) -> str:
    """Draw a texture, rare ones rarely."""
    textures = RARE_TEXTURES if rng.random() < RARE_SHARE else COMMON_TEXTURES
    return textures[int(rng.integers(len(textures)))]


def arrange(names, arrangement: Arrangement, rng: np.random.Generator, scene_seed: tuple[int, ...]) -> Scene:
    """Place named objects clear of the border and, unless they are stacked, of each other; no relation is in doubt."""
    if arrangement == "single":
        size = rng.uniform(0.62, 0.86)
        x, y = rng.uniform(MARGIN + size / 2, 1 - MARGIN - size / 2, 2)
        spots = [(size, x, y)]
    elif arrangement == "stack":
        back = rng.uniform(0.72, 0.86)
        centre = rng.uniform(MARGIN + back / 2, 1 - MARGIN - back / 2, 2)
        spots = [(rng.uniform(0.36, 0.44), *(centre + rng.uniform(-0.1, 0.1, 2))), (back, *centre)]
    elif arrangement == "several":
        spots = _scattered(len(names), rng)
    elif arrangement == "pyramid":
        top = rng.uniform(0.30, 0.40)
        spots = [(top, rng.uniform(0.35, 0.65), MARGIN + top / 2 + rng.uniform(0, 0.04))]
        row = _row(2, 0.30, 0.38, rng)
        spots += [(size, x, 1 - MARGIN - size / 2 - rng.uniform(0, 0.04)) for size, x, _ in row]
    else:
        spots = _row(len(names), *((0.35, 0.45) if len(names) == 2 else (0.282, 0.297)), rng)
        if arrangement == "column":
            spots = [(size, y, x) for size, x, y in spots]
    things = tuple(
        Thing(*name, *(round(float(value), 4) for value in spot)) for name, spot in zip(names, spots, strict=True)
    )
    return Scene(arrangement, things, scene_seed, grey=round(float(rng.uniform(196, 244)), 1))


def _row(number: int, smallest: float, largest: float, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw (size, x, y) from left to right, all near one height."""
    sizes = rng.uniform(smallest, largest, number)
    room = 1 - 2 * MARGIN - sizes.sum() - GAP * (number - 1)
    cuts = np.sort(rng.uniform(0, room, number))
    starts = MARGIN + cuts + np.concatenate([[0], np.cumsum(sizes[:-1] + GAP)])
    height = rng.uniform(0.3, 0.7)
    heights = np.clip(height + rng.uniform(-0.07, 0.07, number), MARGIN + sizes / 2, 1 - MARGIN - sizes / 2)
    return list(zip(sizes, starts + sizes / 2, heights, strict=True))


def _scattered(number: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw (size, x, y) of things of nearly one size, each in a quarter of its own; sizes say little of the number."""
    size = rng.uniform(0.30, 0.44)
    spots = []
    for quarter in rng.permutation(MOST_EQUAL)[:number]:
        own = size * rng.uniform(0.95, 1.05)
        low, high = MARGIN + own / 2, 0.5 - GAP / 2 - own / 2
        corner = np.array(divmod(int(quarter), 2))
        x, y = np.where(corner, 1 - rng.uniform(low, high, 2), rng.uniform(low, high, 2))
        spots.append((own, x, y))
    return spots


def extra(scene: Scene) -> dict:
    """List what json tells of every sample, beside its captions."""
    unseen = any(is_unseen(thing.texture, thing.colour, thing.shape) for thing in scene.things)
    return {"arrangement": scene.arrangement, "unseen": unseen, "objects": [thing._asdict() for thing in scene.things]}
