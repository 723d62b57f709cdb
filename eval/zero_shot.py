"""Zero-shot classification: pictures against the mean prompt embedding of each class."""

from collections.abc import Sequence

import numpy as np

from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.eval.class_folders import ClassFolders, open_data
from softmoe_clip.eval.classnames import check_classes, find_classnames
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.encoder import Encoder
from softmoe_clip.eval.metrics import classification_chance, classification_metrics, per_class_accuracy
from softmoe_clip.eval.results import Results
from softmoe_clip.eval.templates import Template, fill, find_templates


def class_embeddings(encoder: Encoder, classnames: Sequence[str], templates: Sequence[Template]) -> np.ndarray:
    """Return unit vectors (classes, z): the mean of the unit embeddings of each class's prompts, renormalised."""
    # Classes in groups whose prompts fill about a batch: 1,000 classes times 80 prompts never lie in memory together.
    group = max(1, encoder.batch_size // len(templates))
    means = []
    with progress("class embeddings", total=len(classnames), unit="classes") as advance:
        for start in range(0, len(classnames), group):
            names = classnames[start : start + group]
            prompts = encoder.texts([fill(template, name) for name in names for template in templates])
            means.append(prompts.reshape(len(names), len(templates), -1).mean(axis=1))
            advance(len(names))
    means = np.concatenate(means)
    return means / np.maximum(np.linalg.norm(means, axis=-1, keepdims=True), 1e-12)


def zero_shot(encoder: Encoder, task: TaskConfig, suite: SuiteConfig) -> Results:
    """Score one labelled set of pictures (shards with `.cls`, or class folders)."""
    place = suite.place(task.data)
    data = open_data(place)
    classnames, templates = words_of(task, suite, data)
    class_emb = class_embeddings(encoder, classnames, templates)
    pictures = encoder.image_set(data)
    if None in pictures.labels:
        key = pictures.keys[pictures.labels.index(None)]
        raise ValueError(f"sample {key} of {place} has no label (.cls): zero_shot needs one for every picture")
    labels = np.array(pictures.labels)
    check_classes(len(classnames), labels)
    scores = pictures.embeddings @ class_emb.T
    per_class = per_class_accuracy(scores, labels)
    return Results(
        metrics=classification_metrics(scores, labels),
        chance=classification_chance(len(classnames)),
        meta={"num_pictures": len(labels), "num_classes": len(classnames), "skipped": pictures.skipped},
        details={
            "per_class": [
                {"name": name, "top1": accuracy, "num_pictures": count}
                for name, (accuracy, count) in zip(classnames, per_class, strict=True)
            ]
        },
    )


def words_of(task: TaskConfig, suite: SuiteConfig, data: ShardSet | ClassFolders) -> tuple[list[str], list[Template]]:
    """Find class names and templates of a task; raises ValueError where there are none."""
    given, templates = task.classnames, task.templates
    if isinstance(given, str) and given != "imagenet":
        given = suite.place(given)
    has_names = isinstance(data, ClassFolders) and given is None
    classnames = data.classnames if has_names else find_classnames(suite.place(task.data), given)
    if isinstance(templates, str) and templates.endswith(".txt"):
        templates = suite.place(templates)
    return classnames, find_templates(templates)
