"""Plan the sets that the demo's numbers are measured on: none of their scenes is in training."""

from itertools import count, permutations

import numpy as np

from softmoe_clip.data_pipelines.scenes_grammar import (
    COMMON_TEXTURES,
    RARE_TEXTURES,
    Scene,
    counted,
    full_captions,
    relation_and_reversed,
)
from softmoe_clip.data_pipelines.scenes_long import long_caption
from softmoe_clip.data_pipelines.scenes_negation import Negated, true_and_false_negation
from softmoe_clip.data_pipelines.scenes_plan import (
    MOST_EQUAL,
    Sample,
    arrange,
    draw_names,
    draw_scene,
    extra,
    unseen_names,
)

PICTURES_PER_CLASS = 10
NUM_RELATIONS = 1000
NUM_COUNTING = 600  # 25 of each pair of a true and a false number, with seen and unseen things
NUM_NEGATION = 600
# Streams of random numbers: one per set, so that no set depends on the size of another. Training has 0, 1 and 5.
VAL, COMBINATIONS, RELATIONS, COUNTING, NEGATION, LONG, TEXTURE_SETS = 2, 3, 4, 6, 7, 8, 10

# How many things a scene holds, in turn over the indices, so that every shard holds the whole mixture.
VAL_THINGS = (1, 2, 3, 2, 1, 2, 3, 2, 1, 2)
RELATION_NAMES = {"row": "left or right", "column": "above or below", "stack": "in front or behind"}


def val_samples(seed: int, num_samples: int, known: set[tuple[str, ...]]) -> list[Sample]:
    """Plan held-out scenes, no two with one description."""
    samples, taken = [], set()
    for index in range(num_samples):
        for attempt in count():
            # There are only so many single objects: beyond them come pairs.
            num_things = VAL_THINGS[index % len(VAL_THINGS)] if attempt < 200 else 2
            rng = np.random.default_rng([seed, VAL, index, attempt])
            unseen = np.zeros(num_things, dtype=bool)
            if index // len(VAL_THINGS) % 2:
                unseen[rng.permutation(num_things)[: rng.integers(1, 3)]] = True
            scene = draw_scene(rng, (seed, VAL, index), unseen)
            if scene.description not in taken and (num_things == 1 or scene.description not in known):
                break
        taken.add(scene.description)
        samples.append(Sample(scene, full_captions(scene, rng), extra(scene)))
    return samples


def long_samples(seed: int, val: list[Sample]) -> list[Sample]:
    """Describe each of the held-out scenes once more, in several sentences."""
    return [
        Sample(scene, (long_caption(scene, np.random.default_rng([seed, LONG, index])),), extra(scene))
        for index, (scene, *_) in enumerate(val)
    ]


def combination_samples(seed: int) -> list[Sample]:
    """Plan pictures of single objects of unseen combinations with common textures, in the order of their names."""
    return _of_classes(seed, COMBINATIONS, unseen_names(COMMON_TEXTURES))


def texture_samples(seed: int) -> list[Sample]:
    """Plan pictures of unseen combinations with rare textures; their classes come after the common ones."""
    return _of_classes(seed, TEXTURE_SETS, unseen_names(RARE_TEXTURES), len(unseen_names(COMMON_TEXTURES)))


def _of_classes(seed: int, stream: int, names: list[str], first_label: int = 0) -> list[Sample]:
    samples = []
    for index in range(len(names) * PICTURES_PER_CLASS):
        label = index // PICTURES_PER_CLASS
        rng = np.random.default_rng([seed, stream, index])
        scene = arrange([tuple(names[label].split(" "))], "single", rng, (seed, stream, index))
        samples.append(Sample(scene, full_captions(scene, rng)[:1], extra(scene), first_label + label))
    return samples


def relation_samples(seed: int, known: set[tuple[str, ...]]) -> list[Sample]:
    """Plan scenes of two objects that differ in colour and shape, with a caption and its reversal."""
    samples = []
    for index in range(NUM_RELATIONS):
        for attempt in count():
            rng = np.random.default_rng([seed, RELATIONS, index, attempt])
            scene = draw_scene(rng, (seed, RELATIONS, index), (bool(index % 2),) * 2)
            first, second = scene.things
            if first.colour != second.colour and first.shape != second.shape and scene.description not in known:
                break
        caption, false = relation_and_reversed(scene, "colour and shape", rng)
        samples.append(_pair(scene, caption, false, RELATION_NAMES[scene.arrangement]))
    return samples


def counting_samples(seed: int, known: set[tuple[str, ...]]) -> list[Sample]:
    """Plan scenes of one to four equal objects, with their number and a false one; each is the false one as often."""
    numbers = list(permutations(range(1, MOST_EQUAL + 1), 2))
    samples = []
    for index in range(NUM_COUNTING):
        number, false = numbers[index // 2 % len(numbers)]
        for attempt in range(200):  # there are only so many things that training never counts
            rng = np.random.default_rng([seed, COUNTING, index, attempt])
            names = draw_names(rng, (bool(index % 2),)) * number
            scene = arrange(names, "several", rng, (seed, COUNTING, index))
            if scene.description not in known:
                break
        thing = scene.things[0]
        captions = [counted(told, thing, "colour and shape") for told in (number, false)]
        samples.append(_pair(scene, *captions, "off by one" if abs(number - false) == 1 else "off by two or three"))
    return samples


def negation_samples(seed: int, known: set[tuple[str, ...]]) -> list[Sample]:
    """Plan scenes with a caption that truly denies something, and one that denies what is there."""
    samples = []
    for index in range(NUM_NEGATION):
        negated: Negated = ("shape", "colour", "texture")[index // 2 % 3]
        unseen = (bool(index % 2),) * (1 if negated == "texture" else 2)
        for attempt in count():
            rng = np.random.default_rng([seed, NEGATION, index, attempt])
            scene = draw_scene(rng, (seed, NEGATION, index), unseen)
            first, last = scene.things[0], scene.things[-1]
            apart = first.colour != last.colour and first.shape != last.shape and scene.description not in known
            if apart or negated == "texture":
                break
        samples.append(_pair(scene, *true_and_false_negation(scene, negated, rng), f"no such {negated}"))
    return samples


def _pair(scene: Scene, true: str, false: str, group: str) -> Sample:
    return Sample(scene, (true,), {"false": false, "group": group, **extra(scene)})
