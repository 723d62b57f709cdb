"""What a drawn scene is, and every true sentence that may be said of it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black")
# The order pairs them (see `is_unseen`): two shapes that one kind of object never has in training, as circle and cross,
# look quite different.
SHAPES = ("circle", "square", "triangle", "heart", "diamond", "cross", "star", "ring")
# Of textures too, those five apart in the order look quite different.
COMMON_TEXTURES = ("plain", "striped", "dotted", "checkered")
RARE_TEXTURES = ("zigzag", "halved", "speckled")
TEXTURES = COMMON_TEXTURES + RARE_TEXTURES
NUMBERS = ("one", "two", "three", "four")

# Sizes of single objects, as shares of the picture's side; between the two no word is said.
SMALL, LARGE = 0.69, 0.79
# A centre this far from the middle is said to be on that side.
OFF_CENTRE = 0.07

# Backgrounds below the first level are called grey, above the second bright; all of them are light.
GREY, BRIGHT = 212, 228

PREFIXES = ("a picture of", "an image of", "a drawing of", "this is", "there is", "here is")
ANYTHING = ("shape", "object", "thing")
SYNONYMS = {"plain": "solid", "dotted": "spotted", "checkered": "checked", "small": "little", "large": "big"}
# Per arrangement: how the first object stands to the second, then the second to the first.
RELATIONS = {
    "row": (("left of", "to the left of"), ("right of", "to the right of")),
    "column": (("above", "over", "on top of"), ("below", "under", "beneath")),
    "stack": (("in front of",), ("behind",)),
}
PLACES = {
    "row": ("on the left", "on the right"),
    "column": ("at the top", "at the bottom"),
    "stack": ("in front", "behind"),
}

Arrangement = Literal["single", "row", "column", "stack", "pyramid", "several"]
Detail = Literal["full", "colour and shape", "texture and shape", "colour", "shape"]


class Thing(NamedTuple):
    """One object: `size` (its diameter), `x` and `y` (its centre) are shares of the picture's side, y pointing down."""

    texture: str
    colour: str
    shape: str
    size: float
    x: float
    y: float

    @property
    def name(self) -> str:
        """What zero-shot calls it, as in "striped red star"."""
        return f"{self.texture} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Things from left to right (row), top to bottom (column), front to back (stack), one above two (pyramid), or equal
    ones anywhere (several).

    `grey` is the background's level, of 255; `seed` is for drawing.
    """

    arrangement: Arrangement
    things: tuple[Thing, ...]
    seed: tuple[int, ...]
    grey: float = 225

    @property
    def description(self) -> tuple[str, ...]:
        """Name all that captions tell of several objects: two scenes with one description are the same to a reader."""
        return (self.arrangement, *(thing.name for thing in self.things))


def captions(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Write up to five different true captions; the first names everything, later ones may say less."""
    say = {1: _say_one, 2: _say_two, 3: _say_three}
    said = _say_several(scene, rng) if scene.arrangement == "several" else say[len(scene.things)](scene, rng)
    return tuple(dict.fromkeys(said))


def full_captions(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Write one or two captions that each name every texture, colour and shape, for sets without ambiguous captions."""
    things = scene.things
    if len(things) == 1:
        said = [phrase(things[0]), _single(things[0], "full", rng)]
    elif len(things) == 2:
        said = [relation(scene, "full", rng), _places(scene, "full", rng)]
    else:
        said = [_listing(scene, "full", rng)]
    return tuple(dict.fromkeys(said))


def phrase(thing: Thing, detail: Detail = "full", anything: str = "shape") -> str:
    """Name a thing with its article: "an orange star", or "an orange shape" where only the colour is told."""
    words = {
        "full": thing.name,
        "colour and shape": f"{thing.colour} {thing.shape}",
        "texture and shape": f"{thing.texture} {thing.shape}",
        "colour": f"{thing.colour} {anything}",
        "shape": thing.shape,
    }[detail]
    return with_article(words)


def counted(number: int, thing: Thing, detail: Detail = "full") -> str:
    """Say how many of a thing: "three red stars"."""
    words = phrase(thing, detail).split(" ", 1)[1]
    return f"{NUMBERS[number - 1]} {words if number == 1 else plural(words)}"


def plural(words: str) -> str:
    """Put the last word into the plural."""
    return f"{words}{'es' if words.endswith('s') else 's'}"


def with_article(words: str) -> str:
    """Put "a" or "an" in front."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def relation(scene: Scene, detail: Detail, rng: np.random.Generator) -> str:
    """Say how one of two things stands to the other, from either side: "a red circle left of a blue square"."""
    return relation_and_reversed(scene, detail, rng)[0]


def relation_and_reversed(scene: Scene, detail: Detail, rng: np.random.Generator) -> tuple[str, str]:
    """Say the relation, then the same words with the two things exchanged, which is false."""
    anything = _pick(ANYTHING, rng)
    names = [phrase(thing, detail, anything) for thing in scene.things]
    side = int(rng.integers(2))
    words = _pick(RELATIONS[scene.arrangement][side], rng)
    if rng.random() < 0.15:
        words = f"is {words}"
    subject, other = names[side], names[1 - side]
    return f"{subject} {words} {other}", f"{other} {words} {subject}"


def _say_one(scene: Scene, rng: np.random.Generator) -> list[str]:
    thing = scene.things[0]
    name = phrase(thing)
    # Colour alone tells most pictures of a batch apart: captions without it are what teaches shapes and textures.
    return [
        f"{_pick(PREFIXES, rng)} {name}" if rng.random() < 0.5 else name,
        _single(thing, "full", rng),
        phrase(thing, "shape"),
        _single(thing, "shape", rng),
        _vary(phrase(thing, "texture and shape"), rng),
    ]


def _say_two(scene: Scene, rng: np.random.Generator) -> list[str]:
    # What says less fits more pictures of a batch but for the relation: there only word order tells right from wrong.
    first, second = scene.things
    vague = tuple(
        detail for detail in ("colour", "shape", "texture and shape") if phrase(first, detail) != phrase(second, detail)
    )
    return [
        relation(scene, "full", rng),
        _places(scene, "colour and shape", rng),
        relation(scene, _pick(vague, rng), rng),
        _places(scene, _pick(vague, rng), rng),
    ]


def _say_three(scene: Scene, rng: np.random.Generator) -> list[str]:
    return [_listing(scene, detail, rng) for detail in ("full", "texture and shape", "shape")]


def _say_several(scene: Scene, rng: np.random.Generator) -> list[str]:
    # What says less leaves the number alone to tell the pictures of a batch apart.
    number, thing = len(scene.things), scene.things[0]
    prefix = f"there {'is' if number == 1 else 'are'}" if rng.random() < 0.5 else _pick(PREFIXES[:3], rng)
    full = counted(number, thing)
    return [
        f"{prefix} {full}" if rng.random() < 0.5 else full,
        counted(number, thing, "colour and shape"),
        counted(number, thing, "shape"),
        counted(number, thing, "texture and shape"),
    ]


def _single(thing: Thing, detail: Detail, rng: np.random.Generator) -> str:
    """Add what is true of size and place: "a large red star in the top left"."""
    size, place = size_word(thing), place_words(thing)
    words = phrase(thing, detail).split(" ", 1)[1]
    if size and (not place or rng.random() < 0.6):
        words = f"{size} {words}"
    words = _vary(with_article(words), rng)
    return f"{words} {place}" if place else words


def size_word(thing: Thing) -> str:
    """Say "small" or "large" of a single thing, or nothing in between."""
    return "small" if thing.size < SMALL else "large" if thing.size > LARGE else ""


def place_words(thing: Thing) -> str:
    """Say where the centre clearly is: "in the top left", "on the right", "in the middle"; else nothing."""
    across, down = thing.x - 0.5, thing.y - 0.5
    side = ("left" if across < 0 else "right") if abs(across) > OFF_CENTRE else ""
    level = ("top" if down < 0 else "bottom") if abs(down) > OFF_CENTRE else ""
    if side and level:
        return f"in the {level} {side}"
    if side:
        return f"on the {side}"
    if level:
        return f"at the {level}"
    return "in the middle" if max(abs(across), abs(down)) < OFF_CENTRE / 2 else ""


def _places(scene: Scene, detail: Detail, rng: np.random.Generator) -> str:
    """Say where both things are: "a red star on the left and a blue ring on the right"."""
    anything = _pick(ANYTHING, rng)
    names = [phrase(thing, detail, anything) for thing in scene.things]
    pairs = list(zip(names, PLACES[scene.arrangement], strict=True))
    if rng.random() < 0.5:
        pairs.reverse()
    (first, here), (second, there) = pairs
    if rng.random() < 0.25:
        return f"{here} {first}, {there} {second}"
    return f"{first} {here} and {second} {there}"


def _listing(scene: Scene, detail: Detail, rng: np.random.Generator) -> str:
    """Name three things in their order: "a red star, a blue ring and a green moon from left to right"."""
    first, second, third = (phrase(thing, detail) for thing in scene.things)
    if scene.arrangement == "pyramid":
        if rng.random() < 0.5:
            return f"{first} {_pick(('above', 'over'), rng)} {second} and {third}"
        return f"{second} and {third} {_pick(('below', 'under'), rng)} {first}"
    if rng.random() < 0.4:
        return f"{second} between {first} and {third}"
    course = "from left to right" if scene.arrangement == "row" else "from top to bottom"
    listed = f"{first}, {second} and {third}"
    return f"{listed} {course}" if rng.random() < 0.5 else f"{course} {listed}"


def _vary(words: str, rng: np.random.Generator) -> str:
    """Exchange words for their synonyms now and then."""
    return " ".join(SYNONYMS[word] if word in SYNONYMS and rng.random() < 0.25 else word for word in words.split(" "))


def _pick(choices: tuple, rng: np.random.Generator):
    return choices[int(rng.integers(len(choices)))]
