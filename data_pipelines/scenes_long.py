"""Describe a scene in several sentences, about 25 words: each thing, its place, the background, what is missing."""

import numpy as np

from softmoe_clip.data_pipelines.scenes_grammar import (
    BRIGHT,
    GREY,
    NUMBERS,
    Scene,
    phrase,
    place_words,
    plural,
    size_word,
    with_article,
)
from softmoe_clip.data_pipelines.scenes_negation import absent


def long_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Write one true text of several sentences; the order of two of them changes."""
    tell = _one if len(scene.things) == 1 else {"several": _several, "pyramid": _pyramid}.get(scene.arrangement, _line)
    sentences = [_opening(scene, rng), *tell(scene, rng), _missing(scene, rng)]
    if rng.random() < 0.5:
        sentences[0], sentences[-1] = sentences[-1], sentences[0]
    return " ".join(sentences)


def background_word(scene: Scene) -> str:
    """Say "grey" or "bright" of a background that clearly is, else "light", which all of them are."""
    return "grey" if scene.grey < GREY else "bright" if scene.grey > BRIGHT else "light"


def _opening(scene: Scene, rng: np.random.Generator) -> str:
    number = len(scene.things)
    noun = ("object", "shape", "thing")[int(rng.integers(3))]
    what = f"{NUMBERS[number - 1]} {plural(noun) if number > 1 else noun}"
    way = ("{}", "a drawing of {}", "here we see {}")[int(rng.integers(3))].format(what)
    return f"{way} on a {background_word(scene)} background."


def _missing(scene: Scene, rng: np.random.Generator) -> str:
    shape, colour = (
        words[int(rng.integers(len(words)))] for words in (absent(scene, "shape"), absent(scene, "colour"))
    )
    return f"no {shape} and nothing {colour}."


def _one(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = scene.things[0]
    size = {"small": "small", "large": "large"}.get(size_word(thing), "")
    place = place_words(thing) or "near the middle"
    words = " ".join(filter(None, (size, thing.name)))
    return f"{with_article(words)} {place}.", f"the {thing.shape} is {thing.colour} and {thing.texture}."


def _several(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    thing = scene.things[0]
    number = NUMBERS[len(scene.things) - 1]
    return f"each is {phrase(thing)}.", f"so we count {number} {thing.colour} {plural(thing.shape)}."


def _pyramid(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    top, left, right = map(phrase, scene.things)
    return (f"at the top {top}, below it {left} and {right}.",)


def _line(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    course = {"row": "from left to right", "column": "from top to bottom", "stack": "from front to back"}
    *others, last = map(phrase, scene.things)
    return (f"{course[scene.arrangement]} {', '.join(others)} and {last}.",)
