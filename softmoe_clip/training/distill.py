"""Distillation: a teacher's softmax over the global batch as targets, for the student's own (as open_clip's)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softmoe_clip.config import TrainConfig
from softmoe_clip.data_pipelines.loader import Batch
from softmoe_clip.data_pipelines.tokenizers import cut_for_clip, in_list
from softmoe_clip.data_pipelines.transforms import per_plane, standardise
from softmoe_clip.models.store import LoadedModel, load
from softmoe_clip.training.distributed import gather_with_grad

ROWS = 1024  # of a process, whose similarities to the global batch are in memory at a time
CHUNK_SIZE = 256  # pairs that run through the teacher at a time
Features = Float[Tensor, "b z"]
TaughtFeatures = Float[Tensor, "b t"]  # teachers have widths of their own


class Taught(NamedTuple):
    """What a teacher makes of this process's pairs: unit vectors, and its multiplier."""

    image: TaughtFeatures
    text: TaughtFeatures
    logit_scale: Float[Tensor, ""]


@dataclass(frozen=True)
class Teacher:
    """A model in eval mode that embeds the pairs the student is shown, each with its own sizes, norms and ids."""

    loaded: LoadedModel
    student_cfg: dict  # how pictures that come as floats have been normalised
    device: torch.device
    weight: float = 1.0

    def added_to(self, contrastive: Callable[..., Tensor], batch: Batch) -> "Distilled":
        """Return a loss for this batch alone: the contrastive one, and what the teacher says of it."""
        return Distilled(contrastive, self(batch), self.weight)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Taught:
        """Embed a batch, in chunks; the student's precision is the caller's to set."""
        rows = range(0, len(batch.captions), CHUNK_SIZE)
        pairs = [self.embed(batch.images[i : i + CHUNK_SIZE], batch.captions[i : i + CHUNK_SIZE]) for i in rows]
        image, text = (torch.cat(features) for features in zip(*pairs, strict=True))
        return Taught(image, text, self.loaded.model.logit_scale.exp().float())

    def embed(self, images: Tensor, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return the unit vectors of some pairs, in float32."""
        model = self.loaded.model
        image = model.encode_image(self.pixels(images.to(self.device, non_blocking=True)), normalize=True)
        text = model.encode_text(self.token_ids(captions).to(self.device, non_blocking=True), normalize=True)
        return image.float(), text.float()

    def pixels(self, images: Tensor) -> Float[Tensor, "b 3 y x"]:
        """Resize and normalise the student's pictures for the teacher."""
        own, size = self.loaded.preprocess_cfg, self.loaded.picture_size
        if images.is_floating_point():
            mean, std = (per_plane(self.student_cfg[name], images.device) for name in ("mean", "std"))
            images = (images * std + mean) * 255
        if images.shape[-2:] != size:
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(0, 255)
        return standardise(images, own["mean"], own["std"])

    def token_ids(self, captions: list[str]) -> Tensor:
        """Tokenize captions as the teacher does."""
        from open_clip import SimpleTokenizer

        captions, tokenizer = in_list(captions), self.loaded.tokenizer
        if isinstance(tokenizer, SimpleTokenizer):
            captions = cut_for_clip(captions, tokenizer.context_length or 77)
        return tokenizer(captions)


def load_teacher(config: TrainConfig, student_cfg: dict, device: torch.device) -> Teacher | None:
    """Load the teacher of a run, None for a run without one; ValueError where there is no such model, or no picture."""
    if config.distill is None:
        return None
    if config.data.image_features is not None:
        raise ValueError("distill shows the teacher pictures, but data.image_features holds none: set one of the two")
    return Teacher(load(config.distill.model, str(device)), student_cfg, device, config.distill.weight)


def distill_loss(image: Features, text: Features, logit_scale: Float[Tensor, ""], taught: Taught) -> Float[Tensor, ""]:
    """Return the cross entropy of the teacher's softmax and the student's, both ways, over the global batch.

    As in open_clip's DistillClipLoss. The mean over processes is the single-process value, and DDP's averaged gradients
    are its gradients. Biases cancel in a softmax.
    """
    by_image = soft_cross_entropy(image, text, logit_scale, taught.image, taught.text, taught.logit_scale)
    by_text = soft_cross_entropy(text, image, logit_scale, taught.text, taught.image, taught.logit_scale)
    return (by_image + by_text) / 2


def soft_cross_entropy(
    rows: Features,
    others: Features,
    scale: Tensor,
    taught_rows: TaughtFeatures,
    taught_others: TaughtFeatures,
    taught_scale: Tensor,
) -> Float[Tensor, ""]:
    """Return the mean over this process's rows; similarities are computed for some rows at a time, and not kept."""
    others, taught_others = gather_with_grad(others), gather_with_grad(taught_others)

    def of_rows(rows: Tensor, taught_rows: Tensor, others: Tensor, scale: Tensor) -> Tensor:
        targets = (taught_scale * taught_rows @ taught_others.T).softmax(1)
        return -(targets * (scale * rows @ others.T).log_softmax(1)).sum()

    if len(rows) <= ROWS:
        return of_rows(rows, taught_rows, others, scale) / len(rows)
    parts = zip(rows.split(ROWS), taught_rows.split(ROWS), strict=True)
    return sum(checkpoint(of_rows, *part, others, scale, use_reentrant=False) for part in parts) / len(rows)


@dataclass
class Distilled:
    """A contrastive loss with distillation added, to be called as the loss alone; `distill_loss` is for the log."""

    contrastive: Callable[..., Tensor]
    taught: Taught
    weight: float
    distill_loss: Tensor | None = field(default=None, init=False)

    def __call__(self, image: Features, text: Features, logit_scale: Tensor, *more: Any, **options: Any) -> Tensor:
        added = distill_loss(image, text, logit_scale, self.taught)
        self.distill_loss = added.detach()
        return self.contrastive(image, text, logit_scale, *more, **options) + self.weight * added
