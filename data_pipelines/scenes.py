"""Plan and write the embedded data set: drawn scenes to train on, and held-out ones to measure with.

A fifth of all combinations of texture, colour and shape (`is_unseen`) never occurs in training, neither drawn nor
told; any two of the three do.
"""

from collections.abc import Sequence
from contextlib import closing
from functools import cache
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.new_folder import new_folder
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.scenes_draw import pictures, usable_processes
from softmoe_clip.data_pipelines.scenes_grammar import (
    COLOURS,
    SHAPES,
    TEXTURES,
    Arrangement,
    Scene,
    Thing,
    captions,
    full_captions,
    relation_and_reversed,
)
from softmoe_clip.data_pipelines.shard_writer import ShardWriter

PICTURES_PER_CLASS = 10
NUM_RELATIONS = 1000
# Streams of random numbers: one per split, so that no set depends on the size of another.
TRAIN, TWINS, VAL, COMBINATIONS, RELATIONS, FAMILIAR = range(6)

# How many things a scene holds, in turn over the indices of a split, so that every shard holds the whole mixture.
TRAIN_THINGS = (1, 2, 1, 2, 1, 2, 1, 2, 3, 1)
VAL_THINGS = (1, 2, 3, 2, 1, 2, 3, 2, 1, 2)
ARRANGEMENTS: dict[int, tuple[Arrangement, ...]] = {
    1: ("single",),
    2: ("row", "column", "stack"),
    3: ("row", "column", "pyramid"),
}

# Twice "stack": which of two things is in front is the relation that a run of minutes does learn, so it sees it more.
TWIN_ARRANGEMENTS: tuple[Arrangement, ...] = ("row", "stack", "column", "stack")
RELATION_NAMES = {"row": "left or right", "column": "above or below", "stack": "in front or behind"}

NUM_FAMILIAR = 12  # pairs of objects

MARGIN = 0.022
GAP = 0.022


class Sample(NamedTuple):
    """A planned scene with all that is written beside its picture."""

    scene: Scene
    captions: tuple[str, ...]
    extra: dict
    label: int | None = None


def write_scenes(
    out: str | Path,
    num_train: int = 12000,
    num_val: int = 500,
    seed: int = 0,
    image_size: int = 64,
    num_processes: int | None = None,
) -> None:
    """Write OUT/train, OUT/val, OUT/combinations and OUT/relations as shards; the bytes depend on seed and sizes alone.

    - train: 50 % one object, 40 % two, 10 % three, with three to five captions each. Scenes of two come in
      eights, the same two objects in each relation, and half of them show one of twelve familiar pairs of objects.
    - val: scenes whose description is not in train (single objects: new pictures) and is unique within val, for
      retrieval; every other ten hold an unseen combination (json `unseen`). Captions name every texture, colour and
      shape.
    - combinations: `PICTURES_PER_CLASS` single objects for each unseen combination, with `.cls` labels and
      classnames.txt, for zero-shot.
    - relations: two objects with one true caption and, in json `reversed`, the false one with the same words; both
      objects are unseen combinations in every other sample (json `unseen`); json `relation` names the kind.

    Raises ValueError where OUT is not empty.
    """
    if min(num_train, num_val, image_size - 15) < 1:
        raise ValueError(
            f"scenes need num_train and num_val >= 1 and image_size >= 16, got {num_train=}, {num_val=}, {image_size=}"
        )
    train = [train_sample(seed, index) for index in range(num_train)]
    known = {sample.scene.description for sample in train}
    splits = {
        "train": train,
        "val": val_samples(seed, num_val, known),
        "combinations": combination_samples(seed),
        "relations": relation_samples(seed, known),
    }
    with new_folder(out) as folder:
        _write(folder, splits, image_size, num_processes or usable_processes(num_train))
        names = "".join(f"{name}\n" for name in unseen_names())
        (folder / "combinations" / "classnames.txt").write_text(names, "utf-8")


def is_unseen(texture: str, colour: str, shape: str) -> bool:
    """True for combinations that training never shows, for any seed: a fifth, spread evenly over all pairs.

    Who knows only two of the three still has to choose: mostly between two shapes, always between two colours.
    """
    return (TEXTURES.index(texture) + COLOURS.index(colour) + SHAPES.index(shape)) % 5 == 0


def unseen_names() -> list[str]:
    """List the zero-shot classes, the unseen combinations: "striped red star"."""
    return [
        f"{texture} {colour} {shape}"
        for colour, shape, texture in product(COLOURS, SHAPES, TEXTURES)
        if is_unseen(texture, colour, shape)
    ]


def train_sample(seed: int, index: int) -> Sample:
    """Plan one training scene, a function of its arguments alone."""
    num_things = TRAIN_THINGS[index % len(TRAIN_THINGS)]
    rng = np.random.default_rng([seed, TRAIN, index])
    scene_seed = (seed, TRAIN, index)
    if num_things == 2:
        # Eight in a row hold the same two objects in each of their six relations (twice where one hides a part of the
        # other); half of these groups show one of a few familiar pairs. So a batch holds pictures that only the
        # relation tells apart.
        turn, place = divmod(index, len(TRAIN_THINGS))
        group, member = divmod(turn * TRAIN_THINGS.count(2) + TRAIN_THINGS[:place].count(2), 8)
        twins = np.random.default_rng([seed, TWINS, group])
        names = familiar_pairs(seed)[group // 2 % NUM_FAMILIAR] if group % 2 else _names(twins, (False, False))
        arrangement = TWIN_ARRANGEMENTS[member % 4]
        scene = _arrange(names[:: 1 if member < 4 else -1], arrangement, rng, scene_seed)
    else:
        scene = _scene(rng, scene_seed, (False,) * num_things)
    return Sample(scene, captions(scene, rng), _extra(scene))


@cache
def familiar_pairs(seed: int) -> list[list[tuple[str, str, str]]]:
    """Choose the pairs of objects that training shows most often; colours and shapes are dealt out evenly."""
    rng = np.random.default_rng([seed, FAMILIAR])
    num_objects = 2 * NUM_FAMILIAR
    colours, shapes = (
        [words[i] for _ in range(num_objects) for i in rng.permutation(len(words))] for words in (COLOURS, SHAPES)
    )
    objects = []
    for colour, shape in zip(colours[:num_objects], shapes, strict=False):
        seen = [texture for texture in TEXTURES if not is_unseen(texture, colour, shape)]
        objects.append((seen[int(rng.integers(len(seen)))], colour, shape))
    return [objects[first : first + 2] for first in range(0, num_objects, 2)]


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
            scene = _scene(rng, (seed, VAL, index), unseen)
            if scene.description not in taken and (num_things == 1 or scene.description not in known):
                break
        taken.add(scene.description)
        samples.append(Sample(scene, full_captions(scene, rng), _extra(scene)))
    return samples


def combination_samples(seed: int) -> list[Sample]:
    """Plan pictures of single objects of unseen combinations, in the order of `unseen_names`."""
    samples = []
    for label, name in enumerate(unseen_names()):
        for index in range(label * PICTURES_PER_CLASS, (label + 1) * PICTURES_PER_CLASS):
            rng = np.random.default_rng([seed, COMBINATIONS, index])
            scene = _arrange([tuple(name.split(" "))], "single", rng, (seed, COMBINATIONS, index))
            samples.append(Sample(scene, full_captions(scene, rng)[:1], _extra(scene), label))
    return samples


def relation_samples(seed: int, known: set[tuple[str, ...]]) -> list[Sample]:
    """Plan scenes of two objects that differ in colour and shape, with a caption and its reversal."""
    samples = []
    for index in range(NUM_RELATIONS):
        for attempt in count():
            rng = np.random.default_rng([seed, RELATIONS, index, attempt])
            scene = _scene(rng, (seed, RELATIONS, index), (bool(index % 2),) * 2)
            first, second = scene.things
            if first.colour != second.colour and first.shape != second.shape and scene.description not in known:
                break
        caption, false = relation_and_reversed(scene, "colour and shape", rng)
        told = {"reversed": false, "relation": RELATION_NAMES[scene.arrangement]}
        samples.append(Sample(scene, (caption,), {**told, **_extra(scene)}))
    return samples


def _scene(rng: np.random.Generator, scene_seed: tuple[int, ...], unseen: Sequence[bool]) -> Scene:
    """Draw what is to be seen; `unseen` says of each object whether it is one that training never shows."""
    arrangements = ARRANGEMENTS[len(unseen)]
    arrangement = arrangements[int(rng.integers(len(arrangements)))]
    return _arrange(_names(rng, unseen), arrangement, rng, scene_seed)


def _names(rng: np.random.Generator, unseen: Sequence[bool]) -> list[tuple[str, str, str]]:
    """Draw as many different (texture, colour, shape); among several, plain ones are more frequent."""
    names: list[tuple[str, str, str]] = []
    pairs = set()
    while len(names) < len(unseen):
        texture = TEXTURES[0] if len(unseen) > 1 and rng.random() < 0.3 else TEXTURES[int(rng.integers(len(TEXTURES)))]
        pair = COLOURS[int(rng.integers(len(COLOURS)))], SHAPES[int(rng.integers(len(SHAPES)))]
        if is_unseen(texture, *pair) == bool(unseen[len(names)]) and pair not in pairs:
            pairs.add(pair)
            names.append((texture, *pair))
    return names


def _arrange(names, arrangement: Arrangement, rng: np.random.Generator, scene_seed: tuple[int, ...]) -> Scene:
    """Place named objects clear of the border and, unless they are stacked, of each other; no relation is in doubt."""
    if arrangement == "single":
        size = rng.uniform(0.62, 0.86)
        x, y = rng.uniform(MARGIN + size / 2, 1 - MARGIN - size / 2, 2)
        spots = [(size, x, y)]
    elif arrangement == "stack":
        back = rng.uniform(0.72, 0.86)
        centre = rng.uniform(MARGIN + back / 2, 1 - MARGIN - back / 2, 2)
        spots = [(rng.uniform(0.36, 0.44), *(centre + rng.uniform(-0.1, 0.1, 2))), (back, *centre)]
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
    return Scene(arrangement, things, scene_seed)


def _row(number: int, smallest: float, largest: float, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw (size, x, y) from left to right, all near one height."""
    sizes = rng.uniform(smallest, largest, number)
    room = 1 - 2 * MARGIN - sizes.sum() - GAP * (number - 1)
    cuts = np.sort(rng.uniform(0, room, number))
    starts = MARGIN + cuts + np.concatenate([[0], np.cumsum(sizes[:-1] + GAP)])
    height = rng.uniform(0.3, 0.7)
    heights = np.clip(height + rng.uniform(-0.07, 0.07, number), MARGIN + sizes / 2, 1 - MARGIN - sizes / 2)
    return list(zip(sizes, starts + sizes / 2, heights, strict=True))


def _extra(scene: Scene) -> dict:
    unseen = any(is_unseen(thing.texture, thing.colour, thing.shape) for thing in scene.things)
    return {"arrangement": scene.arrangement, "unseen": unseen, "objects": [thing._asdict() for thing in scene.things]}


def _write(folder: Path, splits: dict[str, list[Sample]], image_size: int, num_processes: int) -> None:
    scenes = [sample.scene for samples in splits.values() for sample in samples]
    with (
        progress("drawing scenes", total=len(scenes), unit="pictures") as advance,
        closing(pictures(scenes, image_size, num_processes)) as drawn,
    ):
        for split, samples in splits.items():
            with ShardWriter(folder / split) as writer:
                for sample in samples:
                    writer.add(next(drawn), "png", sample.captions, sample.extra, sample.label)
                    advance()
