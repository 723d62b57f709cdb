"""Tell a true caption from the same caption with its relation reversed: chance is one half, by construction."""

import json

import numpy as np

from softmoe_clip.data_pipelines.tar_index import RawSample
from softmoe_clip.eval.class_folders import open_data
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.eval.metrics import TIE
from softmoe_clip.eval.results import Results


def relations(encoder: Encoder, task: TaskConfig, suite: SuiteConfig) -> Results:
    """Return the share of pictures closer to their true caption than to the reversed one; a tie counts half."""
    data = open_data(suite.place(task.data))
    pictures = encoder.image_set(data)
    pairs = [caption_pair(data.read(index)) for index in pictures.indices]
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


def caption_pair(sample: RawSample) -> tuple[str, str]:
    """Read the true and the reversed caption from a sample's json."""
    try:
        content = json.loads(sample.members["json"])
        return str(content["caption"]), str(content["reversed"])
    except (KeyError, TypeError, ValueError):
        where = f"sample {sample.key} in {sample.shard}"
        raise ValueError(f'{where} has no json with "caption" and "reversed", which a relations task needs') from None
