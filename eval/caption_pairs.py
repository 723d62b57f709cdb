"""Tell a true caption from a false one with nearly the same words: chance is one half, by construction."""

import json
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.tar_index import RawSample
from softmoe_clip.eval.class_folders import open_data
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.eval.metrics import TIE
from softmoe_clip.eval.results import Results


def caption_pairs(encoder: Encoder, task: TaskConfig, suite: SuiteConfig) -> Results:
    """Return the share of pictures closer to their true caption than to the false one; a tie counts half.

    The kind of task (relations, counting, negation) is a name for what the pairs are about. Samples whose json names a
    `group` are also counted by it: `left or right/accuracy`.
    """
    data = open_data(suite.place(task.data))
    pictures = encoder.image_set(data)
    pairs = [caption_pair(data.read(index)) for index in pictures.indices]
    texts = encoder.texts([text for pair in pairs for text in pair.captions]).reshape(len(pairs), 2, -1)
    right = preferred(np.einsum("bz,btz->bt", pictures.embeddings, texts))
    metrics = {"accuracy": float(right.mean())}
    for group in sorted({pair.group for pair in pairs if pair.group}):
        metrics[f"{group}/accuracy"] = float(right[[pair.group == group for pair in pairs]].mean())
    return Results(
        metrics=metrics,
        chance=dict.fromkeys(metrics, 0.5),
        meta={"num_pictures": len(pairs), "skipped": pictures.skipped},
    )


def preferred(scores: np.ndarray) -> np.ndarray:
    """Return 1 where the first of two scores (b, 2) is larger, 0 where it is smaller, 0.5 for a tie."""
    ahead = scores[:, 0] - scores[:, 1]
    return np.where(np.abs(ahead) <= TIE, 0.5, ahead > 0)


class CaptionPair(NamedTuple):
    """The true caption and the false one, and the group of pairs that they belong to, if that is said."""

    captions: tuple[str, str]
    group: str


def caption_pair(sample: RawSample) -> CaptionPair:
    """Read both captions from a sample's json."""
    try:
        content = json.loads(sample.members["json"])
        return CaptionPair((str(content["caption"]), str(content["false"])), str(content.get("group", "")))
    except (KeyError, TypeError, ValueError):
        where = f"sample {sample.key} in {sample.shard}"
        raise ValueError(
            f'{where} has no json with "caption" and "false", which tasks on pairs of captions need'
        ) from None
