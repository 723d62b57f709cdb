"""Held-out scenes: not in training; what should be true is, what should be false is not, and no word tells which."""

from collections import Counter

import pytest
from scenes_oracle import count_is_true, long_text_is_true, negation_is_true, relation_is_true, things_told

from softmoe_clip.data_pipelines.scenes import train_sample
from softmoe_clip.data_pipelines.scenes_grammar import NUMBERS
from softmoe_clip.data_pipelines.scenes_held_out import (
    counting_samples,
    long_samples,
    negation_samples,
    relation_samples,
    val_samples,
)
from softmoe_clip.data_pipelines.scenes_plan import is_unseen


@pytest.fixture(scope="module")
def known():
    return {train_sample(0, index).scene.description for index in range(4800)}


def test_held_out_scenes_are_unique_not_in_training_and_half_of_them_hold_unseen_combinations(known):
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
        caption, false = sample.captions[0], sample.extra["false"]
        assert sorted(caption.split()) == sorted(false.split())
        assert relation_is_true(caption, sample.scene)
        assert not relation_is_true(false, sample.scene)
        assert all(
            is_unseen(thing.texture, thing.colour, thing.shape) == bool(index % 2) for thing in sample.scene.things
        )


def holds_only(sample, unseen: bool) -> bool:
    return all(is_unseen(thing.texture, thing.colour, thing.shape) == unseen for thing in sample.scene.things)


def test_a_false_number_is_false_and_each_number_is_true_as_often_as_false(known):
    samples = counting_samples(0, known)
    assert len(samples) == 600
    told = Counter()
    for index, sample in enumerate(samples):
        caption, false = sample.captions[0], sample.extra["false"]
        assert count_is_true(caption, sample.scene)
        assert not count_is_true(false, sample.scene)
        number, other = (NUMBERS.index(words.split()[0]) for words in (caption, false))
        assert caption.split()[1:-1] == false.split()[1:-1]
        assert sample.extra["group"] == ("off by one" if abs(number - other) == 1 else "off by two or three")
        assert holds_only(sample, bool(index % 2))
        told[number, other] += 1
    assert set(told.values()) == {50}
    assert len(told) == 12
    assert not any(sample.scene.description in known for sample in samples if len(sample.scene.things) > 1)


def test_counting_scenes_are_found_also_where_training_has_counted_everything():
    everything = {sample.scene.description for sample in counting_samples(0, set())}
    assert len(counting_samples(0, everything)) == 600


def test_a_false_negation_denies_what_is_there_and_a_true_one_what_is_not(known):
    samples = negation_samples(0, known)
    assert Counter(sample.extra["group"] for sample in samples) == {
        "no such shape": 200,
        "no such colour": 200,
        "no such texture": 200,
    }
    denied = Counter(), Counter()
    for index, sample in enumerate(samples):
        caption, false = sample.captions[0], sample.extra["false"]
        assert negation_is_true(caption, sample.scene), (caption, sample.scene)
        assert not negation_is_true(false, sample.scene), (false, sample.scene)
        if "texture" not in sample.extra["group"]:
            assert caption.split()[:-1] == false.split()[:-1]
            assert sample.scene.description not in known
        assert holds_only(sample, bool(index % 2))
        for counter, words in zip(denied, (caption, false), strict=True):
            counter[words.split()[-1]] += 1
    # Nothing can be won by knowing which words are denied often.
    for word in denied[0] | denied[1]:
        true, false = (counter[word] for counter in denied)
        assert abs(true - false) < 3 * (true + false) ** 0.5, word


def test_long_texts_tell_the_held_out_scenes_truly_and_apart(known):
    val = val_samples(0, 200, known)
    samples = long_samples(0, val)
    assert [sample.scene for sample in samples] == [sample.scene for sample in val]
    for sample in samples:
        (text,) = sample.captions
        assert 18 <= len(text.split()) <= 32
        assert [long_text_is_true(text, other.scene) for other in samples].count(True) == 1
        assert long_text_is_true(text, sample.scene)
