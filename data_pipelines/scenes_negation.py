"""Say of a scene what is not in it: "a red star and no circle", "a blue ring without stripes"."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from softmoe_clip.data_pipelines.scenes_grammar import (
    ANYTHING,
    COLOURS,
    SHAPES,
    TEXTURES,
    Detail,
    Scene,
    phrase,
    with_article,
)
from softmoe_clip.data_pipelines.scenes_plan import draw_texture

Negated = Literal["shape", "colour", "texture"]
WORDS: dict[Negated, tuple[str, ...]] = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES}
PATTERNS = {
    "striped": "stripes",
    "dotted": "dots",
    "checkered": "checks",
    "zigzag": "zigzags",
    "speckled": "specks",
}


def negation(scene: Scene, rng: np.random.Generator, sayable: Callable[[str, str, str], bool]) -> str:
    """Write one true caption that denies a shape, a colour or a texture.

    SAYABLE says which combinations of texture, colour and shape may be named, were it to deny them.
    """
    negated = ("shape", "colour", "texture")[int(rng.integers(3))]
    thing = scene.things[int(rng.integers(len(scene.things)))]
    if negated == "texture":
        words = [
            texture
            for texture in TEXTURES
            if sayable(texture, thing.colour, thing.shape) and texture not in {other.texture for other in scene.things}
        ]
    else:
        words = absent(scene, negated)
    # What names no thing in full fits most pictures of a batch but for those that it denies.
    details: dict[Negated, tuple[Detail, ...]] = {
        "shape": ("full", "colour and shape", "colour"),
        "colour": ("full", "texture and shape", "shape"),
        "texture": ("colour and shape", "colour", "shape"),
    }
    word = _draw(words, negated, rng)
    anything = ANYTHING[int(rng.integers(len(ANYTHING)))]
    if rng.random() < 0.5:
        return denial(with_article(anything), negated, word)
    return denial(phrase(thing, details[negated][int(rng.integers(3))], anything), negated, word)


def true_and_false_negation(scene: Scene, negated: Negated, rng: np.random.Generator) -> tuple[str, str]:
    """Deny something absent, then, with the same words otherwise, something that is there, which is false.

    Shapes and colours denied are those of the other of two things; a texture, that of the only thing.
    """
    side = int(rng.integers(len(scene.things)))
    thing, other = scene.things[side], scene.things[-1 - side]
    said = phrase(thing, "shape" if negated == "colour" else "colour and shape")
    word = _draw(absent(scene, negated), negated, rng)
    return denial(said, negated, word), denial(said, negated, getattr(other, negated))


def denial(said: str, negated: Negated, word: str) -> str:
    """Add to what is there what is not: "a star" becomes "a star and nothing red"."""
    if negated == "shape":
        return f"{said} and no {word}"
    if negated == "colour":
        return f"{said} and nothing {word}"
    return f"{said} without {PATTERNS[word]}" if word in PATTERNS else f"{said} that is not {word}"


def absent(scene: Scene, negated: Negated) -> list[str]:
    """List the shapes, colours or textures that nothing in the scene has."""
    there = {getattr(thing, negated) for thing in scene.things}
    return [word for word in WORDS[negated] if word not in there]


def _draw(words: list[str], negated: Negated, rng: np.random.Generator) -> str:
    # Rare textures are as rarely denied as they are seen, else the word alone would tell what is true.
    if negated == "texture":
        return next(texture for texture in iter(lambda: draw_texture(rng), None) if texture in words)
    return words[int(rng.integers(len(words)))]
