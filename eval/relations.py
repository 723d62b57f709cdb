"""Tell a true caption from the same caption with its relation reversed: chance is one half, by construction."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from softmoe_clip.eval.class_folders import open_data
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.eval.metrics import TIE
from softmoe_clip.eval.results import Results


def relations(encoder: Encoder, task: TaskConfig, suite: SuiteConfig) -> Results:
    """Return the share of pictures closer to their true caption than to the reversed one; a tie counts half."""
    data = open_data(suite.place(task.data))
    pictures = encoder.image_set(data)
    pairs = list(caption_pairs(data, pictures.keys, suite.place(task.data)))
    texts = encoder.texts([text for pair in pairs for text in pair]).reshape(len(pairs), 2, -1)
    scores = np.einsum("bz,btz->bt", pictures.embeddings, texts)
    return Results(
        metrics={"accuracy": float(preferred(scores).mean())},
        chance={"accuracy": 0.5},
        meta={"num_pictures": len(pairs), "skipped": pictures.skipped},
    )


def preferred(scores: np.ndarray) -> np.ndarray:
    """Return 1 where the first of two scores (b, 2) is larger, 0 where it is smaller, 0.5 for a tie."""
    ahead = scores[:, 0] - scores[:, 1]
    return np.where(np.abs(ahead) <= TIE, 0.5, ahead > 0)


def caption_pairs(data: Any, keys: list[str], place: str) -> Iterator[tuple[str, str]]:
    """Read (caption, reversed) from the json of each picture that was embedded, in the order of the set."""
    samples = (data.read(index) for index in range(len(data)))
    for key in keys:
        sample = next(sample for sample in samples if sample.key == key)
        try:
            content = json.loads(sample.members["json"])
            yield str(content["caption"]), str(content["reversed"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f'sample {key} of {place} has no json with "caption" and "reversed"') from None
