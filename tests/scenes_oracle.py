"""Read a scene's captions back, word by word, and compare what they say with where its things are."""

import re

from softmoe_clip.data_pipelines.scenes_grammar import (
    ANYTHING,
    COLOURS,
    NUMBERS,
    SHAPES,
    SYNONYMS,
    TEXTURES,
    Scene,
    Thing,
)

PLAIN_WORDS = {synonym: word for word, synonym in SYNONYMS.items()}
BEFORE, AFTER = (
    {"row": ("left",), "column": ("above", "over", "top"), "stack": ("in front",)},
    {"row": ("right",), "column": ("below", "under", "beneath"), "stack": ("behind",)},
)
AXES = {"row": "x", "column": "y", "stack": "size"}  # what is in front is smaller
SURFACES = {"stripes": "striped", "dots": "dotted", "checks": "checkered", "zigzags": "zigzag", "specks": "speckled"}


def told_attributes(words: str) -> set[str]:
    """Which textures, colours and shapes stand in a few words, in the singular."""
    plain_words = (PLAIN_WORDS.get(word, word) for word in words.split())
    return {word for word in plain_words if word in {*TEXTURES, *COLOURS, *SHAPES}}


def attributes(thing: Thing) -> set[str]:
    return {thing.texture, thing.colour, thing.shape}


def things_told(words: str, scene: Scene) -> list[Thing]:
    """The scene's things, in the order in which a caption names them; fails where it names one that is not there."""
    told = []
    for match in re.finditer(rf"\ban? ((?:\w+ )*?)({'|'.join(SHAPES + ANYTHING)})\b", words):
        # Prefixes: "a picture of a plain red star".
        unknown = set(match[1].split()) - {*TEXTURES, *COLOURS, *PLAIN_WORDS, "small", "large"}
        assert not unknown - {"picture", "image", "drawing", "of", "a", "an"}, words
        said = told_attributes(f"{match[1]}{match[2]}")
        fitting = [thing for thing in scene.things if said <= attributes(thing)]
        assert fitting, f"{words!r} names {said}, not in {scene}"
        told += fitting[:1]
    return told


def relation_is_true(words: str, scene: Scene) -> bool:
    """Read a caption about two things, and compare it with where they stand."""
    first, second = things_told(words, scene)
    axis = AXES[scene.arrangement]
    before = getattr(first, axis) < getattr(second, axis)
    places = re.findall(r"\b(left|right|top|bottom|front|behind)\b", words)
    if len(places) == 2:
        return before == (places[0] in ("left", "top", "front"))
    said_before = bool(re.search(rf"\b({'|'.join(BEFORE[scene.arrangement])})\b", words))
    said_after = bool(re.search(rf"\b({'|'.join(AFTER[scene.arrangement])})\b", words))
    assert said_before != said_after
    return before == said_before


def count_is_true(words: str, scene: Scene) -> bool:
    """Read "(there are, a picture of) three red stars": so many such things, and no more."""
    prefix, numbers, nouns = r"(?:there (?:is|are)|an? \w+ of)", "|".join(NUMBERS), "|".join(SHAPES + ANYTHING)
    match = re.fullmatch(rf"(?:{prefix} )?({numbers}) ((?:\w+ )*?)({nouns})(e?s)?", words)
    assert match, words
    number, noun = NUMBERS.index(match[1]) + 1, match[3]
    assert bool(match[4]) == (number > 1), words
    assert set(match[2].split()) <= {*TEXTURES, *COLOURS}, words
    return sum(told_attributes(f"{match[2]}{noun}") <= attributes(thing) for thing in scene.things) == number


def negation_is_true(words: str, scene: Scene) -> bool:
    """Read "a red star and no circle": what is said is there, what is denied is not."""
    match = re.fullmatch(r"(an? .+?) (and no|and nothing|without|that is not) (\w+)", words)
    assert match, words
    said, kind, denied = match.groups()
    things_told(said, scene)
    fitting = [thing for thing in scene.things if told_attributes(said) <= attributes(thing)]
    if kind == "and no":
        assert denied in SHAPES
        return all(thing.shape != denied for thing in scene.things)
    if kind == "and nothing":
        assert denied in COLOURS
        return all(thing.colour != denied for thing in scene.things)
    texture = SURFACES.get(denied, denied)
    assert texture in TEXTURES
    return all(thing.texture != texture for thing in fitting)


def long_text_is_true(text: str, scene: Scene) -> bool:
    """Read a text of several sentences, each of a known form; fails at a sentence that has none."""
    sentences = [sentence.strip() for sentence in text.removesuffix(".").split(".")]
    read = [sentence_is_true(sentence, scene) for sentence in sentences]
    return all(read)


def sentence_is_true(words: str, scene: Scene) -> bool:
    name = rf"an? (?:(?:small|large) )?(?:{'|'.join(TEXTURES)}) (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
    things = scene.things

    def match(pattern):
        return re.fullmatch(pattern, words)

    def there(said):
        return all(any(told_attributes(one) <= attributes(thing) for thing in things) for one in re.findall(name, said))

    if told := match(rf"(?:.* )?({'|'.join(NUMBERS)}) (?:{'|'.join(ANYTHING)})s? on a (grey|light|bright) background"):
        level = {"grey": scene.grey < 212, "light": 212 <= scene.grey <= 228, "bright": scene.grey > 228}[told[2]]
        return level and told[1] == NUMBERS[len(things) - 1]
    if told := match(r"no (\w+) and nothing (\w+)"):
        return all(told[1] != thing.shape and told[2] != thing.colour for thing in things)
    if told := match(rf"({name}) ((?!and ).+)"):
        return (
            len(things) == 1
            and there(told[1])
            and place_is_true(told[2], things[0])
            and size_is_true(told[1], things[0])
        )
    if told := match(r"the (\w+) is (\w+) and (\w+)"):
        return len(things) == 1 and {*told.groups()} == attributes(things[0])
    if told := match(rf"each is ({name})"):
        return all(told_attributes(told[1]) == attributes(one) for one in things)
    if told := match(r"so we count (.+)"):
        return count_is_true(told[1], scene)
    if told := match(rf"from (left|top|front) to \w+ ({name})(?:, ({name}))? and ({name})"):
        axis = {"left": "x", "top": "y", "front": "size"}[told[1]]
        arrangement = {"left": "row", "top": "column", "front": "stack"}[told[1]]
        named = [told_attributes(one) for one in told.groups()[1:] if one]
        return arrangement == scene.arrangement and named == [
            attributes(thing) for thing in sorted(things, key=lambda thing: getattr(thing, axis))
        ]
    if told := match(rf"at the top ({name}), below it ({name}) and ({name})"):
        named = [told_attributes(one) for one in told.groups()]
        in_order = [
            min(things, key=lambda thing: thing.y),
            *sorted(sorted(things, key=lambda t: t.y)[1:], key=lambda t: t.x),
        ]
        return scene.arrangement == "pyramid" and named == [attributes(thing) for thing in in_order]
    raise AssertionError(f"no known sentence: {words}")


def place_is_true(words: str, thing: Thing) -> bool:
    said = set(words.split())
    clear = {"left": thing.x < 0.44, "right": thing.x > 0.56, "top": thing.y < 0.44, "bottom": thing.y > 0.56}
    return all(clear[word] for word in said & set(clear)) and (
        "middle" not in said or max(abs(thing.x - 0.5), abs(thing.y - 0.5)) < 0.08
    )


def size_is_true(words: str, thing: Thing) -> bool:
    return ("small" not in words or thing.size < 0.7) and ("large" not in words or thing.size > 0.78)


def combinations_told(words: str) -> set[tuple[str, str, str]]:
    """Which combinations of texture, colour and shape a caption names, as there or, "a red star without dots", not."""
    singular = re.sub(rf"\b({'|'.join(SHAPES)})e?s\b", r"\1", words)
    plain_words = " ".join(PLAIN_WORDS.get(word, word) for word in singular.split())
    any_of = "|".join
    found = re.findall(rf"\b({any_of(TEXTURES)}) ({any_of(COLOURS)}) ({any_of(SHAPES)})\b", plain_words)
    found += [
        (texture, colour, shape)
        for colour, shape, texture in re.findall(
            rf"\b({any_of(COLOURS)}) ({any_of(SHAPES)}) (?:without|that is not|with an?) (\w+)", plain_words
        )
    ]
    found += [
        (texture, colour, shape) for shape, colour, texture in re.findall(r"the (\w+) is (\w+) and (\w+)", plain_words)
    ]
    return {(SURFACES.get(texture, texture), colour, shape) for texture, colour, shape in found}
