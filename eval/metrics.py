"""From scores to numbers: recall, ranks and accuracies in float32, chance levels, and one rule for ties.

The rule: scores closer than `TIE` count as equal, and equals stand in random order. A share is its expectation over
that order and a median rank the median over queries and orders together, so that a model that gives everything the
same embedding scores exactly chance, and a class, picture or caption that is there twice gets its share of the credit.
Where only the pictures are equal, text to image is chance exactly; image to text is so on the average over the one
order of the captions that all pictures then have.
"""

from bisect import bisect_right
from collections.abc import Sequence
from math import comb, lgamma
from typing import NamedTuple

import numpy as np

# The rounding of a float32 dot product of two unit vectors; differences below it say nothing about the model.
TIE = 1e-6
RECALL_AT = (1, 5, 10)
# Scores in memory at once: 16 MB in float32, and a few times that in comparisons, however many pictures there are.
CHUNK = 2**22


class Ranking(NamedTuple):
    """Per query: candidates before its best right one, wrong ones tied with that, and right ones tied (itself too)."""

    better: np.ndarray
    tied: np.ndarray
    right: np.ndarray


def retrieval_metrics(
    image_emb: np.ndarray, text_emb: np.ndarray, image_of_text: np.ndarray, recall_at: Sequence[int] = RECALL_AT
) -> dict[str, float]:
    """Score retrieval both ways between (n, z) pictures and (m, z) captions; caption j belongs to `image_of_text[j]`.

    image_to_text/recall@k: share of pictures with at least one of their captions among the k nearest.
    text_to_image/recall@k: share of captions whose picture is among the k nearest. Both as in CLIP_benchmark.
    median_rank counts from 1; a picture's rank is that of its best caption.
    """
    image_emb, text_emb = checked(image_emb), checked(text_emb)
    image_of_text = np.asarray(image_of_text)
    assert image_of_text.shape == (len(text_emb),)
    own_counts = np.bincount(image_of_text, minlength=len(image_emb))
    assert len(own_counts) == len(image_emb)
    assert own_counts.min() > 0, "every picture needs a caption"
    return both_ways(*rank(image_emb, text_emb, image_of_text), recall_at)


def retrieval_chance(image_of_text: np.ndarray, recall_at: Sequence[int] = RECALL_AT) -> dict[str, float]:
    """Return what random ranking scores, exactly: the same metrics where all candidates are tied."""
    num_texts, own_counts = len(image_of_text), np.bincount(image_of_text)
    num_images = len(own_counts)
    to_text = Ranking(np.zeros(num_images, np.int64), num_texts - own_counts, own_counts)
    one = np.ones(num_texts, np.int64)
    return both_ways(to_text, Ranking(0 * one, (num_images - 1) * one, one), recall_at)


def both_ways(to_text: Ranking, to_image: Ranking, recall_at: Sequence[int]) -> dict[str, float]:
    """Put the metrics of both rankings together."""
    return {
        **{f"image_to_text/recall@{k}": float(hits(to_text, k).mean()) for k in recall_at},
        "image_to_text/median_rank": median_rank(to_text),
        **{f"text_to_image/recall@{k}": float(hits(to_image, k).mean()) for k in recall_at},
        "text_to_image/median_rank": median_rank(to_image),
    }


def rank(image_emb: np.ndarray, text_emb: np.ndarray, image_of_text: np.ndarray) -> tuple[Ranking, Ranking]:
    """Rank captions for every picture and pictures for every caption, a block of pictures at a time."""
    num_images, num_texts = len(image_emb), len(text_emb)
    own = np.einsum("md,md->m", image_emb[image_of_text], text_emb)
    better_t, tied_t = np.zeros(num_texts, np.int64), np.full(num_texts, -1, np.int64)
    better_i, tied_i, right_i = (np.zeros(num_images, np.int64) for _ in range(3))
    rows = max(1, CHUNK // num_texts)
    for start in range(0, num_images, rows):
        part = slice(start, min(start + rows, num_images))
        scores = image_emb[part] @ text_emb.T
        is_own = image_of_text == np.arange(part.start, part.stop)[:, None]
        # The product of a pair depends on its place in the block in the last bits: one value for it everywhere.
        scores = np.where(is_own, own, scores)
        best = np.where(is_own, scores, -np.inf).max(axis=1, keepdims=True)
        above, near = scores > best + TIE, np.abs(scores - best) <= TIE
        better_i[part], right_i[part] = above.sum(axis=1), (near & is_own).sum(axis=1)
        tied_i[part] = near.sum(axis=1) - right_i[part]
        better_t += (scores > own + TIE).sum(axis=0)
        tied_t += (np.abs(scores - own) <= TIE).sum(axis=0)
    return Ranking(better_i, tied_i, right_i), Ranking(better_t, tied_t, np.ones(num_texts, np.int64))


def hits(ranking: Ranking, k: int) -> np.ndarray:
    """Return each query's chance of a right candidate in the top k, with equals in random order (hypergeometric)."""
    places = np.clip(k - ranking.better, 0, None)
    hit = (places > ranking.tied).astype(np.float64)
    tied = (places > 0) & (places <= ranking.tied)
    cases, case = np.unique(
        np.stack([ranking.tied + ranking.right, ranking.right, places], axis=1)[tied], axis=0, return_inverse=True
    )
    hit[tied] = np.array([some_drawn(*map(int, numbers)) for numbers in cases])[case.ravel()]
    return hit


def some_drawn(total: int, right: int, draws: int) -> float:
    """Return the probability that `draws` out of `total`, without putting back, hold one of the `right` ones."""
    few, many = sorted((right, draws))  # the two may change places
    if few <= 100:
        return (comb(total, few) - comb(total - many, few)) / comb(total, few)
    logs = lgamma(total - few + 1) - lgamma(total - few - many + 1) - lgamma(total + 1) + lgamma(total - many + 1)
    return float(-np.expm1(logs))


def median_rank(ranking: Ranking) -> float:
    """Return the median, over queries and orders of equals, of the rank (from 1) of the first right candidate."""
    last = 1 + int((ranking.better + ranking.tied).max())

    def first_above(share: float) -> int:
        return 1 + bisect_right(range(1, last), share, key=lambda k: hits(ranking, k).mean())

    # Half of the ranks may lie at or below one rank and half above: then the median is between it and the next.
    return (first_above(0.5 - 1e-9) + first_above(0.5 + 1e-9)) / 2


def classification_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Score (n, classes) against int labels: top1, top5 (from six classes on) and the mean of the classes' own top1."""
    scores, labels = checked(scores), np.asarray(labels)
    per_class = per_class_accuracy(scores, labels)
    metrics = {"top1": float(top_k(scores, labels, 1).mean())}
    if scores.shape[1] > 5:
        metrics["top5"] = float(top_k(scores, labels, 5).mean())
    return {**metrics, "mean_per_class": float(np.mean([accuracy for accuracy, count in per_class if count]))}


def classification_chance(num_classes: int) -> dict[str, float]:
    """Return what random scores reach."""
    top5 = {"top5": 5 / num_classes} if num_classes > 5 else {}
    return {"top1": 1 / num_classes, **top5, "mean_per_class": 1 / num_classes}


def per_class_accuracy(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, int]]:
    """Return (top1, number of pictures) of each class; 0.0 for a class without pictures."""
    num_classes = scores.shape[1]
    counts = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels, weights=top_k(scores, labels, 1), minlength=num_classes)
    return [(float(r / max(n, 1)), int(n)) for r, n in zip(right, counts, strict=True)]


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Return each picture's chance that its class is in the top k, with equals in random order."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    better = (scores > own + TIE).sum(axis=1)
    tied = (np.abs(scores - own) <= TIE).sum(axis=1)
    return np.clip((k - better) / tied, 0.0, 1.0)


def checked(values: np.ndarray) -> np.ndarray:
    """Return the values in float32; NaN would win every comparison, so that it is refused."""
    values = np.asarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError("embeddings or scores hold NaN or infinity, which cannot be ranked: the model is broken")
    return values
