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

from softmoe_clip.data_pipelines.scenes import (
    is_unseen,
    relation_samples,
    train_sample,
    unseen_names,
    val_samples,
    write_scenes,
)
from softmoe_clip.data_pipelines.scenes_draw import pictures
from softmoe_clip.data_pipelines.scenes_grammar import (
    ANYTHING,
    COLOURS,
    SHAPES,
    SYNONYMS,
    TEXTURES,
    Scene,
    Thing,
    full_captions,
    phrase,
)
from softmoe_clip.data_pipelines.tar_index import ShardSet

PLAIN_WORDS = {synonym: word for word, synonym in SYNONYMS.items()}
BEFORE, AFTER = (
    {"row": ("left",), "column": ("above", "over", "top"), "stack": ("in front",)},
    {"row": ("right",), "column": ("below", "under", "beneath"), "stack": ("behind",)},
)
AXES = {"row": "x", "column": "y", "stack": "size"}  # what is in front is smaller


@pytest.fixture(scope="module")
def train():
    return [train_sample(0, index) for index in range(5000)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "out"
    write_scenes(out, num_train=60, num_val=40, num_processes=1)
    return out


def things_told(words: str, scene: Scene) -> list[Thing]:
    """The scene's things, in the order in which a caption names them; fails where it names one that is not there."""
    told = []
    for match in re.finditer(rf"\ban? ((?:\w+ )*?)({'|'.join(SHAPES + ANYTHING)})\b", words):
        attributes = {PLAIN_WORDS.get(word, word) for word in f"{match[1]}{match[2]}".split()} - {
            *ANYTHING,
            "small",
            "large",
        }
        # Prefixes: "a picture of a plain red star".
        attributes -= {"picture", "image", "drawing", "of", "a", "an"}
        fitting = [thing for thing in scene.things if attributes <= {thing.texture, thing.colour, thing.shape}]
        assert fitting, f"{words!r} names {attributes}, not in {scene}"
        told += fitting[:1]
    return told


def is_true(words: str, scene: Scene) -> bool:
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


def combinations_told(words: str) -> set[tuple[str, str, str]]:
    plain_words = " ".join(PLAIN_WORDS.get(word, word) for word in words.split())
    return set(re.findall(rf"\b({'|'.join(TEXTURES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", plain_words))


def test_no_held_out_combination_is_drawn_or_told_in_training(train):
    unseen = {names for names in product(TEXTURES, COLOURS, SHAPES) if is_unseen(*names)}
    drawn = {tuple(thing.name.split()) for sample in train for thing in sample.scene.things}
    told = {names for sample in train for caption in sample.captions for names in combinations_told(caption)}
    assert drawn == told == set(product(TEXTURES, COLOURS, SHAPES)) - unseen
    assert {names[1:] for names in drawn} == set(product(COLOURS, SHAPES))
    assert not any(sample.extra["unseen"] for sample in train)


def test_held_out_combinations_are_spread_evenly_and_make_at_least_64_classes():
    unseen = [names for names in product(TEXTURES, COLOURS, SHAPES) if is_unseen(*names)]
    assert set(Counter((texture, colour) for texture, colour, _ in unseen).values()) == {1, 2}
    assert set(Counter((texture, shape) for texture, _, shape in unseen).values()) == {2}
    assert sorted(unseen_names()) == sorted(" ".join(names) for names in unseen)
    assert len(unseen) >= 64


def test_training_shows_every_word_about_equally_often_in_the_stated_mixture(train):
    assert Counter(len(sample.scene.things) for sample in train) == {1: 2500, 2: 2000, 3: 500}
    for field in ("colour", "shape"):
        counts = Counter(getattr(thing, field) for sample in train for thing in sample.scene.things).values()
        assert len(counts) == (10 if field == "colour" else 8)
        assert max(counts) < 1.6 * min(counts)
    assert {len(sample.captions) for sample in train} == {3, 4, 5}
    assert all(len(set(sample.captions)) == len(sample.captions) for sample in train)


def test_scenes_of_two_come_in_eights_that_only_their_relation_tells_apart(train):
    pairs = [sample.scene for sample in train if len(sample.scene.things) == 2]
    for start in range(0, len(pairs), 8):
        eight = pairs[start : start + 8]
        assert len({tuple(sorted(thing.name for thing in scene.things)) for scene in eight}) == 1
        assert len({scene.description for scene in eight}) == 6


def test_captions_of_two_things_are_true_and_exchanging_the_things_makes_them_false(train):
    for sample in [sample for sample in train if len(sample.scene.things) == 2][:800]:
        scene = sample.scene
        mirrored = tuple(thing._replace(x=1 - thing.x, y=1 - thing.y, size=1 - thing.size) for thing in scene.things)
        mirrored = Scene(scene.arrangement, mirrored, scene.seed)
        for caption in sample.captions:
            assert is_true(caption, scene), (caption, scene)
            assert not is_true(caption, mirrored), (caption, scene)


def test_captions_of_one_thing_say_its_place_and_size_truly(train):
    places = Counter()
    for sample in [sample for sample in train if len(sample.scene.things) == 1]:
        thing = sample.scene.things[0]
        for caption in sample.captions:
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
    for sample in [sample for sample in train if len(sample.scene.things) == 3]:
        things = first, second, third = sample.scene.things
        for caption, detail in zip(sample.captions, ("full", "texture and shape", "shape"), strict=True):
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


def test_things_are_large_enough_inside_the_picture_and_apart(train):
    for scene in (sample.scene for sample in train):
        things = scene.things
        for thing in things:
            assert 64 * thing.size >= (24 if len(things) == 1 else 18)
            assert thing.size / 2 <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)
        for one, other in combinations(things, 2) if scene.arrangement != "stack" else ():
            gap = max(abs(one.x - other.x), abs(one.y - other.y))
            assert gap > (one.size + other.size) / 2


def test_a_training_scene_depends_on_seed_and_index_alone():
    assert train_sample(3, 7) == train_sample(3, 7)
    assert train_sample(3, 7) != train_sample(4, 7)
    assert len({train_sample(0, index).scene.things for index in range(200)}) == 200


def test_held_out_scenes_are_unique_not_in_training_and_half_of_them_hold_unseen_combinations(train):
    known = {sample.scene.description for sample in train}
    samples = val_samples(0, 500, known)
    assert len({sample.scene.description for sample in samples}) == 500
    captions = Counter(caption for sample in samples for caption in set(sample.captions))
    assert max(captions.values()) == 1
    assert sum(sample.extra["unseen"] for sample in samples) == 250
    assert not any(len(sample.scene.things) > 1 and sample.scene.description in known for sample in samples)
    for sample in samples:
        for caption in sample.captions:
            assert sorted(thing.name for thing in things_told(caption, sample.scene)) == sorted(
                thing.name for thing in sample.scene.things
            )


def test_more_held_out_scenes_than_single_things_can_be_asked_for():
    assert len({sample.scene.description for sample in val_samples(0, 600, set())}) == 600


def test_a_reversed_caption_has_the_same_words_and_is_false():
    samples = relation_samples(0, set())
    assert len(samples) == 1000
    for index, sample in enumerate(samples):
        caption, false = sample.captions[0], sample.extra["reversed"]
        assert sorted(caption.split()) == sorted(false.split())
        assert is_true(caption, sample.scene)
        assert not is_true(false, sample.scene)
        assert all(
            is_unseen(thing.texture, thing.colour, thing.shape) == bool(index % 2) for thing in sample.scene.things
        )


def test_every_set_is_written_with_pictures_captions_and_labels(written):
    sets = {name: ShardSet.open(str(written / name)) for name in ("train", "val", "combinations", "relations")}
    assert {name: len(shards) for name, shards in sets.items()} == {
        "train": 60,
        "val": 40,
        "combinations": 640,
        "relations": 1000,
    }
    classnames = (written / "combinations" / "classnames.txt").read_text("utf-8").splitlines()
    assert classnames == unseen_names()
    labels = Counter()
    for index in range(0, 640, 7):
        members = sets["combinations"].read(index).members
        label = int(members["cls"])
        labels[label] += 1
        assert members["txt"].decode() == full_name(classnames[label])
        assert Image.open(io.BytesIO(members["png"])).size == (64, 64)
    assert len(labels) == 64
    relation = json.loads(sets["relations"].read(3).members["json"])
    assert relation["caption"] == sets["relations"].read(3).members["txt"].decode() != relation["reversed"]
    assert "cls" not in sets["train"].read(0).members


def full_name(classname: str) -> str:
    return full_captions(Scene("single", (Thing(*classname.split(), 0.5, 0.5, 0.5),), ()), np.random.default_rng(0))[0]


@pytest.mark.slow
def test_several_processes_write_the_same_bytes(written, tmp_path):
    write_scenes(tmp_path / "out", num_train=60, num_val=40, num_processes=3)
    files = sorted(path.relative_to(written) for path in written.rglob("*.*") if path.is_file())
    assert len(files) == 21
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
