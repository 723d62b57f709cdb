"""Retrieval examples to look at: drawn at random, half of them right, half of them wrong."""

from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.tar_index import ShardSet

NUM_PICTURES = 500  # that are asked for


class Pool(NamedTuple):
    """Pictures with their captions and the vectors of both; text row j belongs to picture `picture_of_text[j]`."""

    samples: list[int]
    captions: list[tuple[str, ...]]
    images: np.ndarray
    texts: np.ndarray
    picture_of_text: np.ndarray

    def caption(self, row: int) -> str:
        """The caption of a text row."""
        picture = self.picture_of_text[row]
        return self.captions[picture][row - int(np.searchsorted(self.picture_of_text, picture))]


class Found(NamedTuple):
    """One of the best answers: which picture or text row, its cosine, and whether it is right."""

    row: int
    score: float
    right: bool


class Example(NamedTuple):
    """One query (a text row or a picture), the best answers, the rank of the (best) right one from 1, and its row."""

    query: int
    found: list[Found]
    rank: int
    right_row: int


def embed_pool(encoder, shards: ShardSet) -> Pool | None:
    """Embed the first pictures of a shard set and all their captions; None where no picture has one.

    Unreadable samples are passed over.
    """
    from softmoe_clip.data_pipelines.loader import eval_batches

    samples, captions, images = [], [], []
    for batch in eval_batches(shards, encoder.transform, min(encoder.batch_size, NUM_PICTURES)):
        vectors = encoder.images(batch.images) if batch.keys else []
        for vector, sample, texts in zip(vectors, batch.indices, batch.captions, strict=True):
            if texts and len(samples) < NUM_PICTURES:
                samples.append(sample)
                captions.append(texts)
                images.append(vector)
        if len(samples) == NUM_PICTURES:
            break
    if not samples:
        return None
    texts = encoder.texts([text for some in captions for text in some])
    picture_of_text = np.repeat(np.arange(len(samples)), [len(some) for some in captions])
    return Pool(samples, captions, np.stack(images), texts, picture_of_text)


def text_to_image(pool: Pool, num_right: int = 4, num_wrong: int = 4, k: int = 5, seed: int = 0) -> list[Example]:
    """Ask with the first caption of each picture; return some that put the right picture first and some that don't."""
    first = np.searchsorted(pool.picture_of_text, np.arange(len(pool.samples)))
    scores = pool.texts[first] @ pool.images.T
    right = np.eye(len(pool.samples), dtype=bool)
    return [e._replace(query=int(first[e.query])) for e in drawn(scores, right, num_right, num_wrong, k, seed)]


def image_to_text(pool: Pool, num_right: int = 3, num_wrong: int = 3, k: int = 5, seed: int = 1) -> list[Example]:
    """Ask with pictures among all captions."""
    right = pool.picture_of_text[None] == np.arange(len(pool.samples))[:, None]
    return drawn(pool.images @ pool.texts.T, right, num_right, num_wrong, k, seed)


def drawn(scores: np.ndarray, right: np.ndarray, num_right: int, num_wrong: int, k: int, seed: int) -> list[Example]:
    """Draw queries (rows of `scores`) at random among those whose first answer is right, and among the others."""
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    # An answer that ties with the right one counts as before it: a model that says nothing is never "right".
    ranks = 1 + ((scores >= best) & ~right).sum(1)
    order = np.random.default_rng(seed).permutation(len(scores))
    hits = [int(query) for query in order if ranks[query] == 1][:num_right]
    misses = [int(query) for query in order if ranks[query] > 1][:num_wrong]
    examples = []
    for query in hits + misses:
        top = np.lexsort((right[query], -scores[query]))[:k]
        found = [Found(int(row), float(scores[query, row]), bool(right[query, row])) for row in top]
        right_row = int(np.where(right[query], scores[query], -np.inf).argmax())
        examples.append(Example(query, found, int(ranks[query]), right_row))
    return examples
