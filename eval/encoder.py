"""Turn pictures and texts into unit vectors with any model that has `encode_image` and `encode_text`."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.samples import BadSample

GPU_WORKERS = 4
AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class ImageSet(NamedTuple):
    """Unit vectors (n, z) of the good pictures of a set, in its order, with what came with them.

    `indices` are their numbers in the set; `skipped` lists the bad ones (key, shard, reason).
    """

    embeddings: np.ndarray
    keys: list[str]
    captions: list[tuple[str, ...]]
    labels: list[int | None]
    skipped: list[BadSample]
    indices: list[int]


@dataclass
class Encoder:
    """A model (already on `device`), its tokenizer and its transform, ready to embed.

    The model may be in training: its mode is restored after each call. `precision` is that of the towers; embeddings
    are always normalised in float32. `num_workers` processes decode pictures ahead; if not given, a few beside a GPU,
    which would wait for one that decodes, and none without.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    transform: Callable[[Any], Tensor]
    device: str | torch.device = "cpu"
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    batch_size: int = 64
    num_workers: int | None = None

    def __post_init__(self):
        if self.precision not in AUTOCAST:
            raise ValueError(f"precision must be one of {', '.join(AUTOCAST)}, got {self.precision!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.num_workers is None:
            on_gpu = torch.device(self.device).type != "cpu"
            self.num_workers = min(GPU_WORKERS, os.cpu_count() or 1) if on_gpu else 0
        if self.num_workers < 0:
            raise ValueError(f"the number of workers must be 0 or more, got {self.num_workers}")

    def images(self, tensors: Tensor) -> np.ndarray:
        """Embed transformed pictures (b, 3, r, r) as one batch: float32 unit vectors (b, z)."""
        # Without autocast a model held in half precision wants its inputs in its own type.
        dtype = weight_dtype(self.model) if AUTOCAST[self.precision] is None else torch.float32
        with self.evaluating():
            return unit_vectors(self.model.encode_image(tensors.to(self.device, dtype)), "pictures")

    def texts(self, texts: Sequence[str], advance: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """Embed texts, in batches: float32 unit vectors (b, z). `advance` hears the size of each finished batch."""
        parts = []
        with self.evaluating():
            for start in range(0, len(texts), self.batch_size):
                batch = list(texts[start : start + self.batch_size])
                token_ids = torch.as_tensor(self.tokenizer(batch)).to(self.device)
                parts.append(unit_vectors(self.model.encode_text(token_ids), "texts"))
                advance(len(batch))
        return np.concatenate(parts)

    def image_set(self, data: Any) -> ImageSet:
        """Embed the pictures of a ShardSet (or ClassFolders); raise ValueError if none of them can be read."""
        from softmoe_clip.data_pipelines.loader import eval_batches

        embeddings, found = [], ImageSet(np.empty(0), [], [], [], [], [])
        with self.evaluating(), progress("encoding pictures", total=len(data), unit="pictures") as advance:
            for batch in eval_batches(data, self.transform, self.batch_size, self.num_workers):
                embeddings.append(self.images(batch.images))
                found.keys.extend(batch.keys)
                found.captions.extend(batch.captions)
                found.labels.extend(batch.labels)
                found.skipped.extend(batch.skipped)
                found.indices.extend(batch.indices)
                advance(len(batch.keys) + len(batch.skipped))
        return found._replace(embeddings=np.concatenate(embeddings))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Hold the model in eval mode, without gradients, in the encoder's precision; put every module's mode back."""
        modes = [(module, module.training) for module in self.model.modules()]
        dtype = AUTOCAST[self.precision]
        device_type = torch.device(self.device).type
        try:
            self.model.eval()
            # Not inference_mode: a sharded model keeps the memory of its first pass, and could not be trained after it.
            with torch.no_grad(), torch.autocast(device_type, dtype) if dtype else nullcontext():
                yield
        finally:
            for module, training in modes:
                module.training = training


def unit_vectors(features: Tensor, what: str) -> np.ndarray:
    """Normalise features (b, z) in float32; refuse what is not finite, since it would win or lose every comparison."""
    vectors = torch.nn.functional.normalize(features.float(), dim=-1)
    if not torch.isfinite(vectors).all():
        raise ValueError(
            f"the model gives embeddings of {what} that are NaN or infinite: it is broken, or needs float32"
        )
    return vectors.cpu().numpy()


def weight_dtype(model: Any) -> torch.dtype:
    """Return the type of the model's first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
