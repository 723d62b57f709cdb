"""Plan and write the embedded data set: drawn scenes to train on, and held-out ones to measure with.

A fifth of all combinations of texture, colour and shape (`is_unseen`) never occurs in training, neither drawn nor
told, nor denied; any two of the three do.
"""

from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np

from softmoe_clip.data_pipelines.new_folder import new_folder
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.scenes_draw import pictures, usable_processes
from softmoe_clip.data_pipelines.scenes_grammar import (
    COLOURS,
    COMMON_TEXTURES,
    SHAPES,
    TEXTURES,
    Arrangement,
    captions,
)
from softmoe_clip.data_pipelines.scenes_held_out import (
    combination_samples,
    counting_samples,
    long_samples,
    negation_samples,
    relation_samples,
    texture_samples,
    val_samples,
)
from softmoe_clip.data_pipelines.scenes_long import long_caption
from softmoe_clip.data_pipelines.scenes_negation import negation
from softmoe_clip.data_pipelines.scenes_plan import (
    MOST_EQUAL,
    Sample,
    arrange,
    draw_names,
    draw_scene,
    extra,
    is_unseen,
    unseen_names,
)
from softmoe_clip.data_pipelines.shard_writer import ShardWriter

# Streams of random numbers; 2, 3, 4, 6, 7 and 8 are those of the held-out sets.
TRAIN, TWINS, FAMILIAR, EQUALS = 0, 1, 5, 9

# How many things a scene holds, in turn over the indices, so that every shard holds the whole mixture; SEVERAL: one to
# four equal ones.
SEVERAL = 0
TRAIN_THINGS = (1, 2, 1, 2, 1, SEVERAL, 1, 2, 1, 2, 1, 2, 1, 3, 1, 2, 1, 2, 1, 2)
# Twice "stack": which of two things is in front is the relation that a run of minutes does learn, so it sees it more.
TWIN_ARRANGEMENTS: tuple[Arrangement, ...] = ("row", "stack", "column", "stack")

NUM_FAMILIAR = 12  # pairs of objects


def write_scenes(
    out: str | Path,
    num_train: int = 12000,
    num_val: int = 500,
    seed: int = 0,
    image_size: int = 64,
    num_processes: int | None = None,
) -> None:
    """Write OUT/train and the held-out sets as shards; the bytes depend on seed and sizes alone.

    - train: 50 % one object, 40 % two, 5 % three, 5 % one to four equal ones, with three to six captions each; now
      and then one is of several sentences, or denies what is not there. Scenes of two come in eights, the same two
      objects in each relation, equal ones in fours, the same object in each number; half of both show one of twelve
      familiar pairs of objects, or its first object.
    - val: scenes whose description is not in train (single objects: new pictures) and is unique within val, for
      retrieval; every other ten hold an unseen combination (json `unseen`). Captions name every texture, colour and
      shape. long: the same scenes, each with one caption of several sentences.
    - combinations: `PICTURES_PER_CLASS` single objects for each unseen combination with a common texture, with `.cls`
      labels and classnames.txt, for zero-shot. textures: as many with rare textures, among the names of both.
    - relations, counting, negation: a true caption and, in json `false`, one that is not, with the same words but for
      the order of the objects, the number, or what is denied; the objects of every other sample are unseen
      combinations; json `group` names the kind. No word is more often true than false, but for chance.

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
        "val": (val := val_samples(seed, num_val, known)),
        "long": long_samples(seed, val),
        "combinations": combination_samples(seed),
        "textures": texture_samples(seed),
        "relations": relation_samples(seed, known),
        "counting": counting_samples(seed, known),
        "negation": negation_samples(seed, known),
    }
    with new_folder(out) as folder:
        _write(folder, splits, image_size, num_processes or usable_processes(num_train))
        for split, textures in (("combinations", COMMON_TEXTURES), ("textures", TEXTURES)):
            names = "".join(f"{name}\n" for name in unseen_names(textures))
            (folder / split / "classnames.txt").write_text(names, "utf-8")


def train_sample(seed: int, index: int) -> Sample:
    """Plan one training scene, a function of its arguments alone."""
    turn, place = divmod(index, len(TRAIN_THINGS))
    num_things = TRAIN_THINGS[place]
    rng = np.random.default_rng([seed, TRAIN, index])
    scene_seed = (seed, TRAIN, index)
    if num_things == SEVERAL:
        # Four in a row hold one, two, three and four of the same thing; half of these things are familiar ones.
        group, member = divmod(turn * TRAIN_THINGS.count(SEVERAL) + TRAIN_THINGS[:place].count(SEVERAL), MOST_EQUAL)
        equals = np.random.default_rng([seed, EQUALS, group])
        name = familiar_pairs(seed)[group // 2 % NUM_FAMILIAR][0] if group % 2 else draw_names(equals, (False,))[0]
        scene = arrange([name] * (member + 1), "several", rng, scene_seed)
    elif num_things == 2:
        # Eight in a row hold the same two objects in each of their six relations (twice where one hides a part of the
        # other); half of these groups show one of a few familiar pairs. So a batch holds pictures that only the
        # relation tells apart.
        group, member = divmod(turn * TRAIN_THINGS.count(2) + TRAIN_THINGS[:place].count(2), 8)
        twins = np.random.default_rng([seed, TWINS, group])
        names = familiar_pairs(seed)[group // 2 % NUM_FAMILIAR] if group % 2 else draw_names(twins, (False, False))
        arrangement = TWIN_ARRANGEMENTS[member % 4]
        scene = arrange(names[:: 1 if member < 4 else -1], arrangement, rng, scene_seed)
    else:
        scene = draw_scene(rng, scene_seed, (False,) * num_things)
    said = captions(scene, rng)
    # Few, and of single things fewer: it is short captions that teach shapes and textures in minutes.
    every = {1: 8, 2: 4}.get(num_things, 2)
    if turn % every == 1:
        said += (long_caption(scene, rng),)
    elif turn % every == 3:
        said += (negation(scene, rng, lambda *names: not is_unseen(*names)),)
    return Sample(scene, said, extra(scene))


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
        seen = [texture for texture in COMMON_TEXTURES if not is_unseen(texture, colour, shape)]
        objects.append((seen[int(rng.integers(len(seen)))], colour, shape))
    return [objects[first : first + 2] for first in range(0, num_objects, 2)]


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
