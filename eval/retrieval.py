"""Retrieval both ways between pictures and all of their captions."""

import numpy as np

from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.eval.class_folders import open_data
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.eval.metrics import retrieval_chance, retrieval_metrics
from softmoe_clip.eval.results import Results


def retrieval(encoder: Encoder, task: TaskConfig, suite: SuiteConfig) -> Results:
    """Score one captioned set: recall at 1, 5 and 10 and the median rank, image to text and text to image."""
    place = suite.place(task.data)
    pictures = encoder.image_set(open_data(place))
    if () in pictures.captions:
        key = pictures.keys[pictures.captions.index(())]
        raise ValueError(f"sample {key} of {place} has no caption: retrieval needs at least one for every picture")
    captions = [caption for captions in pictures.captions for caption in captions]
    image_of_text = np.repeat(np.arange(len(pictures.keys)), [len(captions) for captions in pictures.captions])
    with progress("encoding captions", total=len(captions), unit="captions") as advance:
        text_emb = encoder.texts(captions, advance)
    return Results(
        metrics=retrieval_metrics(pictures.embeddings, text_emb, image_of_text),
        chance=retrieval_chance(image_of_text),
        meta={"num_pictures": len(pictures.keys), "num_captions": len(captions), "skipped": pictures.skipped},
    )
