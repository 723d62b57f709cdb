"""Scenes: captions are true, held-out pairs stay out of training, and the bytes depend on the seed alone."""

import io
import json
import re
from collections import Counter
from itertools import combinations, product
from multiprocessing import active_children

import numpy as np
import pytest
from PIL import Image
from scenes_oracle import (
    attributes,
    combinations_told,
    count_is_true,
    long_text_is_true,
    negation_is_true,
    relation_is_true,
    things_told,
)

from softmoe_clip.data_pipelines.scenes import train_sample, write_scenes
from softmoe_clip.data_pipelines.scenes_draw import pictures
from softmoe_clip.data_pipelines.scenes_grammar import (
    COLOURS,
    COMMON_TEXTURES,
    RARE_TEXTURES,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    full_captions,
    phrase,
)
from softmoe_clip.data_pipelines.scenes_plan import is_unseen, unseen_names
from softmoe_clip.data_pipelines.tar_index import ShardSet

NEGATION = re.compile(r" (and no|and nothing|without|that is not) ")


@pytest.fixture(scope="module")
def train():
    return [train_sample(0, index) for index in range(4800)]


def is_pair(scene: Scene) -> bool:
    return len(scene.things) == 2 and scene.arrangement != "several"


def positive_captions(sample) -> list[str]:
    """All captions but long texts and negations."""
    return [caption for caption in sample.captions if "." not in caption and not NEGATION.search(caption)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "out"
    write_scenes(out, num_train=60, num_val=40, num_processes=1)
    return out


def test_no_held_out_combination_is_drawn_or_told_in_training(train):
    unseen = {names for names in product(TEXTURES, COLOURS, SHAPES) if is_unseen(*names)}
    drawn = {tuple(thing.name.split()) for sample in train for thing in sample.scene.things}
    told = {names for sample in train for caption in sample.captions for names in combinations_told(caption)}
    assert not (drawn | told) & unseen
    assert drawn & told >= set(product(COMMON_TEXTURES, COLOURS, SHAPES)) - unseen
    assert {names[1:] for names in drawn} == set(product(COLOURS, SHAPES))
    assert not any(sample.extra["unseen"] for sample in train)


def test_held_out_combinations_are_spread_evenly_and_make_64_classes_and_48_with_rare_textures():
    unseen = [names for names in product(TEXTURES, COLOURS, SHAPES) if is_unseen(*names)]
    assert set(Counter((texture, colour) for texture, colour, _ in unseen).values()) == {1, 2}
    assert set(Counter((texture, shape) for texture, _, shape in unseen).values()) == {2}
    assert set(Counter((colour, shape) for _, colour, shape in unseen).values()) == {1, 2}
    assert sorted(unseen_names(TEXTURES)) == sorted(" ".join(names) for names in unseen)
    assert len(unseen) == 112
    assert unseen_names(TEXTURES)[:64] == unseen_names(COMMON_TEXTURES)
    assert unseen_names(TEXTURES)[64:] == unseen_names(RARE_TEXTURES)


def test_training_shows_every_word_about_equally_often_in_the_stated_mixture(train):
    several = [sample for sample in train if sample.scene.arrangement == "several"]
    assert Counter(len(sample.scene.things) for sample in several) == {1: 60, 2: 60, 3: 60, 4: 60}
    others = Counter(len(sample.scene.things) for sample in train if sample.scene.arrangement != "several")
    assert others == {1: 2400, 2: 1920, 3: 240}
    for field in ("colour", "shape"):
        counts = Counter(getattr(thing, field) for sample in train for thing in sample.scene.things).values()
        assert len(counts) == (10 if field == "colour" else 8)
        assert max(counts) < 1.7 * min(counts)
    textures = Counter(sample.scene.things[0].texture for sample in train if sample.scene.arrangement == "single")
    assert min(textures[name] for name in COMMON_TEXTURES) > 0.18 * 2400
    assert all(0.01 * 2400 < textures[name] < 0.035 * 2400 for name in RARE_TEXTURES)
    assert {len(sample.captions) for sample in train} == {3, 4, 5, 6}
    said = [caption for sample in train for caption in sample.captions]
    assert 0.04 < sum("." in caption for caption in said) / len(said) < 0.06
    assert 0.025 < sum("." not in caption and bool(NEGATION.search(caption)) for caption in said) / len(said) < 0.04
    assert all(len(set(sample.captions)) == len(sample.captions) for sample in train)


def test_scenes_of_two_come_in_eights_that_only_their_relation_tells_apart(train):
    pairs = [sample.scene for sample in train if is_pair(sample.scene)]
    for start in range(0, len(pairs), 8):
        eight = pairs[start : start + 8]
        assert len({tuple(sorted(thing.name for thing in scene.things)) for scene in eight}) == 1
        assert len({scene.description for scene in eight}) == 6


def test_captions_of_two_things_are_true_and_exchanging_the_things_makes_them_false(train):
    for sample in [sample for sample in train if is_pair(sample.scene)][:800]:
        scene = sample.scene
        mirrored = tuple(thing._replace(x=1 - thing.x, y=1 - thing.y, size=1 - thing.size) for thing in scene.things)
        mirrored = Scene(scene.arrangement, mirrored, scene.seed)
        for caption in positive_captions(sample):
            assert relation_is_true(caption, scene), (caption, scene)
            assert not relation_is_true(caption, mirrored), (caption, scene)


def test_captions_of_one_thing_say_its_place_and_size_truly(train):
    places = Counter()
    for sample in [sample for sample in train if sample.scene.arrangement == "single"]:
        thing = sample.scene.things[0]
        for caption in positive_captions(sample):
            assert things_told(caption, sample.scene)
            places.update(words := set(re.findall(r"\b(left|right|top|bottom|small|little|large|big)\b", caption)))
            assert not words & {"left"} or thing.x < 0.44
            assert not words & {"right"} or thing.x > 0.56
            assert not words & {"top"} or thing.y < 0.44
            assert not words & {"bottom"} or thing.y > 0.56
            assert not words & {"small", "little"} or thing.size < 0.7
            assert not words & {"large", "big"} or thing.size > 0.78
    assert len(places) == 8
    assert min(places.values()) > 50


def test_captions_of_three_things_name_them_in_their_order(train):
    for sample in train:
        if len(sample.scene.things) != 3 or sample.scene.arrangement == "several":
            continue
        things = first, second, third = sample.scene.things
        for caption, detail in zip(positive_captions(sample), ("full", "texture and shape", "shape"), strict=True):
            if len({phrase(thing, detail) for thing in things}) < 3:
                continue  # it fits two of the things
            told = things_told(caption, sample.scene)
            if "between" in caption:
                assert told == [second, first, third]
            elif re.search("below|under", caption):
                assert told == [second, third, first]
                assert first.y < min(second.y, third.y)
            else:
                assert told == [first, second, third]
                axis = "y" if re.search("bottom|above|over", caption) else "x"
                assert getattr(first, axis) < min(getattr(second, axis), getattr(third, axis))


def test_equal_things_come_in_fours_and_every_caption_counts_them_truly(train):
    several = [sample for sample in train if sample.scene.arrangement == "several"]
    for start in range(0, len(several), 4):
        four = [sample.scene for sample in several[start : start + 4]]
        assert [len(scene.things) for scene in four] == [1, 2, 3, 4]
        assert len({frozenset(attributes(thing)) for scene in four for thing in scene.things}) == 1
    for sample in several:
        for caption in positive_captions(sample):
            assert count_is_true(caption, sample.scene), (caption, sample.scene)
    few, many = ([thing.size for s in several if len(s.scene.things) == n for thing in s.scene.things] for n in (1, 4))
    assert abs(np.mean(few) - np.mean(many)) < 0.02  # a small thing need not be one of many


def test_negations_in_training_are_true_and_deny_no_held_out_combination(train):
    denied = Counter()
    for sample in train:
        for caption in sample.captions:
            if "." not in caption and NEGATION.search(caption):
                assert negation_is_true(caption, sample.scene), (caption, sample.scene)
                denied[caption.split()[-1]] += 1
    assert len(denied) == len(SHAPES) + len(COLOURS) + len(TEXTURES)
    assert ("striped", "red", "star") in combinations_told("a red star without stripes")
    assert ("plain", "red", "star") in combinations_told("a red star that is not solid")


def test_long_texts_in_training_are_true_and_false_of_the_next_scene(train):
    long = [(caption, sample.scene) for sample in train for caption in sample.captions if "." in caption]
    assert len(long) > 1000
    for (text, scene), (_, other) in zip(long, long[1:] + long[:1], strict=True):
        assert long_text_is_true(text, scene), (text, scene)
        assert not long_text_is_true(text, other), (text, other)
        assert 18 <= len(text.split()) <= 32


def test_things_are_large_enough_inside_the_picture_and_apart(train):
    for scene in (sample.scene for sample in train):
        things = scene.things
        for thing in things:
            assert 64 * thing.size >= (24 if scene.arrangement == "single" else 18)
            assert thing.size / 2 <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        for one, other in combinations(things, 2) if scene.arrangement != "stack" else ():
            gap = max(abs(one.x - other.x), abs(one.y - other.y))
            assert gap > (one.size + other.size) / 2


def test_a_training_scene_depends_on_seed_and_index_alone():
    assert train_sample(3, 7) == train_sample(3, 7)
    assert train_sample(3, 7) != train_sample(4, 7)
    assert len({train_sample(0, index).scene.things for index in range(200)}) == 200


def test_every_set_is_written_with_pictures_captions_and_labels(written):
    counts = {
        "train": 60,
        "val": 40,
        "long": 40,
        "combinations": 640,
        "textures": 480,
        "relations": 1000,
        "counting": 600,
        "negation": 600,
    }
    sets = {name: ShardSet.open(str(written / name)) for name in counts}
    assert {name: len(shards) for name, shards in sets.items()} == counts
    for name, textures, first in (("combinations", COMMON_TEXTURES, 0), ("textures", TEXTURES, 64)):
        classnames = (written / name / "classnames.txt").read_text("utf-8").splitlines()
        assert classnames == unseen_names(textures)
        labels = Counter()
        for index in range(0, len(sets[name]), 7):
            members = sets[name].read(index).members
            label = int(members["cls"])
            labels[label] += 1
            assert members["txt"].decode() == full_name(classnames[label])
            assert Image.open(io.BytesIO(members["png"])).size == (64, 64)
        assert set(labels) == set(range(first, len(classnames)))
    for name in ("relations", "counting", "negation"):
        pair = json.loads(sets[name].read(3).members["json"])
        assert pair["caption"] == sets[name].read(3).members["txt"].decode() != pair["false"]
    assert sets["long"].read(3).members["png"] == sets["val"].read(3).members["png"]
    assert "cls" not in sets["train"].read(0).members


def full_name(classname: str) -> str:
    return full_captions(Scene("single", (Thing(*classname.split(), 0.5, 0.5, 0.5),), ()), np.random.default_rng(0))[0]


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(written, tmp_path):
    write_scenes(tmp_path / "out", num_train=60, num_val=40, num_processes=3)
    files = sorted(path.relative_to(written) for path in written.rglob("*.*") if path.is_file())
    assert len(files) == 42
    for file in files:
        if file.suffix != ".npz":
            assert (tmp_path / "out" / file).read_bytes() == (written / file).read_bytes(), file


@pytest.mark.slow
def test_stopping_early_leaves_no_process_behind():
    drawn = pictures([train_sample(0, index).scene for index in range(1000)], 64, 2)
    next(drawn)
    assert len(active_children()) == 2
    drawn.close()
    assert not active_children()


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write_scenes(tmp_path, num_train=1, num_val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_senseless_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_train=0"):
        write_scenes(tmp_path / "out", num_train=0)
