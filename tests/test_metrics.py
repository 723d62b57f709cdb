"""Metrics against slow obvious oracles: every order of ties written out, CLIP_benchmark's definition, exact chance."""

import tracemalloc
from fractions import Fraction
from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest

from softmoe_clip.eval import metrics
from softmoe_clip.eval.metrics import (
    classification_chance,
    classification_metrics,
    per_class_accuracy,
    retrieval_chance,
    retrieval_metrics,
    some_drawn,
)


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def random_set(seed, num_images, num_texts, width=8):
    rng = np.random.default_rng(seed)
    image_of_text = np.concatenate([np.arange(num_images), rng.integers(num_images, size=num_texts - num_images)])
    rng.shuffle(image_of_text)
    images = unit(rng.normal(size=(num_images, width)))
    return images, unit(images[image_of_text] + rng.normal(size=(num_texts, width))), image_of_text


def hit_over_all_orders(scores, right, k):
    """Average, over every order that ties could have, whether one of `right` is in the top k; and all its ranks."""
    found, first = [], []
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda candidate: -round(float(scores[candidate]), 5))
        first.append(1 + min(ranked.index(candidate) for candidate in right))
        found.append(first[-1] <= k)
    return np.mean(found), first


def oracle(image_emb, text_emb, image_of_text, k):
    scores = image_emb.astype(np.float64) @ text_emb.T.astype(np.float64)
    to_text = [hit_over_all_orders(row, np.flatnonzero(image_of_text == i), k) for i, row in enumerate(scores)]
    to_image = [hit_over_all_orders(column, [image_of_text[j]], k) for j, column in enumerate(scores.T)]
    return [(np.mean([hit for hit, _ in way]), np.median([ranks for _, ranks in way])) for way in (to_text, to_image)]


@pytest.mark.parametrize("kinds", [2, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_retrieval_is_the_mean_over_every_order_of_ties(seed, kinds):
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(kinds, 3)))
    images, texts = vectors[rng.integers(kinds, size=4)], vectors[rng.integers(kinds, size=6)]
    image_of_text = np.array([0, 1, 2, 3, *rng.integers(4, size=2)])
    found = retrieval_metrics(images, texts, image_of_text, recall_at=(1, 2, 3))
    for k in (1, 2, 3):
        (to_text, text_rank), (to_image, image_rank) = oracle(images, texts, image_of_text, k)
        assert found[f"image_to_text/recall@{k}"] == pytest.approx(to_text)
        assert found[f"text_to_image/recall@{k}"] == pytest.approx(to_image)
        assert found["image_to_text/median_rank"] == pytest.approx(text_rank)
        assert found["text_to_image/median_rank"] == pytest.approx(image_rank)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_that_of_clip_benchmark(k):
    images, texts, image_of_text = random_set(0, 40, 130)
    scores = texts @ images.T
    # CLIP_benchmark: any positive among the top k of each row (text to image) or each column (image to text).
    positive = np.zeros_like(scores, bool)
    positive[np.arange(len(texts)), image_of_text] = True
    to_image = np.take_along_axis(positive, np.argsort(-scores, axis=1)[:, :k], axis=1).any(axis=1)
    to_text = np.take_along_axis(positive.T, np.argsort(-scores.T, axis=1)[:, :k], axis=1).any(axis=1)
    found = retrieval_metrics(images, texts, image_of_text)
    assert found[f"text_to_image/recall@{k}"] == pytest.approx(to_image.mean())
    assert found[f"image_to_text/recall@{k}"] == pytest.approx(to_text.mean())


def test_a_perfect_model_finds_everything_first():
    images = np.eye(12, dtype=np.float32)
    image_of_text = np.repeat(np.arange(12), 5)
    found = retrieval_metrics(images, images[image_of_text], image_of_text)
    assert set(found.values()) == {1.0}


@pytest.mark.parametrize("noise", [0.0, 3e-8])
def test_a_collapsed_model_scores_chance_and_no_more(noise):
    rng = np.random.default_rng(0)
    image_of_text = rng.permutation(np.concatenate([np.arange(60), rng.integers(60, size=200)]))
    constant = unit(rng.normal(size=16))
    # Rounding noise that points to the right answer must not count either.
    own = rng.normal(size=(60, 16))
    images, texts = constant + noise * own, constant + noise * own[image_of_text]
    found, chance = retrieval_metrics(images, texts, image_of_text), retrieval_chance(image_of_text)
    assert found == pytest.approx(chance)


def test_equal_pictures_share_the_credit():
    images = unit(np.array([[1.0, 0], [1, 0], [0, 1]]))
    found = retrieval_metrics(images, images, np.arange(3))
    assert found["text_to_image/recall@1"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found["text_to_image/recall@5"] == 1


def test_the_size_of_the_blocks_changes_nothing(monkeypatch):
    data = random_set(1, 23, 57)
    whole = retrieval_metrics(*data)
    for chunk in (1, 60, 500):
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        assert retrieval_metrics(*data) == whole


def test_a_pair_is_no_rival_of_itself_however_long_its_vectors_are():
    """The same product has other last bits in a matrix than alone: in long vectors far more than a tie allows."""
    images, texts, image_of_text = random_set(4, 40, 90, width=64)
    assert retrieval_metrics(1000 * images, 1000 * texts, image_of_text) == retrieval_metrics(
        images, texts, image_of_text
    )


@pytest.mark.parametrize(("total", "right", "draws"), [(20_000, 101, 150), (5_000, 300, 120), (900, 400, 101)])
def test_a_draw_of_many_is_that_of_exact_binomials(total, right, draws):
    exact = 1 - Fraction(comb(total - right, draws), comb(total, draws))
    assert some_drawn(total, right, draws) == pytest.approx(float(exact), rel=1e-9)


def test_memory_does_not_grow_with_pictures_times_captions(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 2**15)
    data = random_set(2, 800, 4000)
    tracemalloc.start()
    retrieval_metrics(*data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 800 * 4000 * 4 / 4, "a quarter of the whole score matrix"


def test_what_is_not_a_number_is_refused():
    images, texts, image_of_text = random_set(3, 5, 9)
    texts[4, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        retrieval_metrics(images, texts, image_of_text)


def test_chance_counts_every_possible_draw():
    image_of_text = np.array([0, 0, 0, 1, 2, 2, 2])
    chance = retrieval_chance(image_of_text, recall_at=(1, 2, 3))
    for k in (1, 2, 3):
        draws = list(combinations(range(7), k))
        per_picture = [
            np.mean([any(image_of_text[text] == picture for text in draw) for draw in draws]) for picture in range(3)
        ]
        assert chance[f"image_to_text/recall@{k}"] == pytest.approx(np.mean(per_picture))
        assert chance[f"text_to_image/recall@{k}"] == pytest.approx(k / 3)
    firsts = [[image_of_text[list(order)].tolist().index(i) for i in range(3)] for order in permutations(range(7))]
    assert chance["image_to_text/median_rank"] == 1 + np.median(firsts)
    assert chance["text_to_image/median_rank"] == 2


@pytest.mark.parametrize(
    ("image_of_text", "median"),
    [(np.arange(10), 5.5), (np.arange(13).repeat(2)[:25], 8), (np.arange(9).repeat(5), 6)],
    ids=["one caption", "one or two captions", "five captions"],
)
@pytest.mark.parametrize("equal", ["nothing", "pictures"])
def test_a_model_without_preference_gets_chance_on_the_average(image_of_text, median, equal):
    rng, num_images, num_texts = np.random.default_rng(0), image_of_text.max() + 1, len(image_of_text)
    recalls, ranks = [], []
    for _ in range(3000):
        scores = np.tile(rng.random(num_texts), (num_images, 1))  # equal pictures order the captions alike
        if equal == "nothing":
            scores = rng.random((num_images, num_texts))
        own = image_of_text == np.arange(num_images)[:, None]
        best = np.where(own, scores, -1).max(axis=1, keepdims=True)
        ranks.append(1 + (scores > best).sum(axis=1))
        recalls.append((ranks[-1] <= 5).mean())
    chance = retrieval_chance(image_of_text)
    assert chance["image_to_text/recall@5"] == pytest.approx(np.mean(recalls), abs=0.01)
    assert chance["image_to_text/median_rank"] == median
    assert np.mean(np.concatenate(ranks) < median) <= 0.51
    assert np.mean(np.concatenate(ranks) > median) <= 0.51


def test_chance_of_a_large_set_is_exact_too():
    image_of_text = np.repeat(np.arange(5000), 5)
    chance = retrieval_chance(image_of_text)
    assert chance["image_to_text/recall@1"] == pytest.approx(1 / 5000)
    assert chance["image_to_text/recall@10"] == pytest.approx(1 - np.prod([1 - 5 / (25000 - i) for i in range(10)]))
    assert chance["image_to_text/median_rank"] == pytest.approx(25000 * (1 - 0.5 ** (1 / 5)), rel=1e-3)


def test_accuracy_is_that_of_a_sort():
    rng = np.random.default_rng(4)
    scores, labels = rng.normal(size=(200, 9)).astype(np.float32), rng.integers(9, size=200)
    scores[np.arange(200), labels] += 1
    order = np.argsort(-scores, axis=1)
    found = classification_metrics(scores, labels)
    first = order[:, 0] == labels
    assert found["top1"] == pytest.approx(first.mean())
    assert found["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())
    assert found["mean_per_class"] == pytest.approx(np.mean([first[labels == c].mean() for c in range(9)]))


def test_constant_class_scores_give_chance():
    labels = np.repeat(np.arange(8), 3)
    assert classification_metrics(np.zeros((24, 8)), labels) == pytest.approx(classification_chance(8))


def test_classes_without_pictures_do_not_count_in_the_mean_of_classes():
    scores, labels = np.eye(3)[[0, 0, 2, 0]], np.array([0, 0, 2, 2])
    assert per_class_accuracy(scores, labels) == [(1.0, 2), (0.0, 0), (0.5, 2)]
    assert classification_metrics(scores, labels) == {"top1": 0.75, "mean_per_class": 0.75}


def test_two_classes_of_one_name_share_the_credit():
    scores = np.array([[0.9, 0.9, 0.1]])
    assert classification_metrics(scores, np.array([1]))["top1"] == 0.5
