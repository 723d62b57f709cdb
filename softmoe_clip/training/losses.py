"""The two contrastive losses, each equal to its single-process value whatever the batch is split over."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from softmoe_clip.training.distributed import gather_with_grad, local_offset
from softmoe_clip.training.duplicates import Duplicates
from softmoe_clip.training.loss_chunks import over_rows

Features = Float[Tensor, "b z"]
Scalar = Float[Tensor, ""]


def clip_loss(
    image: Features,
    text: Features,
    logit_scale: Scalar,
    logit_bias: Scalar | None = None,
    duplicates: Duplicates | None = None,
    chunk_size: int | None = None,
) -> Scalar:
    """Return the softmax loss of CLIP (arXiv 2103.00020) over the global batch, for this process's unit vectors.

    The mean over processes is the single-process loss, and DDP's averaged gradients are its gradients. A bias
    cancels in the softmax; adding it all the same keeps DDP from finding a parameter without gradient. Duplicates that
    are positives share a row's target evenly; masked ones are not in its denominator. At most `chunk_size` rows of
    logits are computed at a time, fewer where they are many.
    """
    loss = partial(softmax_rows, offset=local_offset(len(image)), duplicates=of_everyone(duplicates))
    image_loss = over_rows(loss, image, gather_with_grad(text), logit_scale, logit_bias, chunk_size)
    text_loss = over_rows(loss, text, gather_with_grad(image), logit_scale, logit_bias, chunk_size)
    return (image_loss + text_loss) / 2


def siglip_loss(
    image: Features,
    text: Features,
    logit_scale: Scalar,
    logit_bias: Scalar,
    duplicates: Duplicates | None = None,
    chunk_size: int | None = None,
) -> Scalar:
    """Return the sigmoid loss of SigLIP (arXiv 2303.15343): summed over the texts of a row, mean over the pictures.

    Duplicates that are positives have the sign of a pair, masked ones are not in the sum; all else as in `clip_loss`.
    """
    loss = partial(sigmoid_rows, offset=local_offset(len(image)), duplicates=of_everyone(duplicates))
    return over_rows(loss, image, gather_with_grad(text), logit_scale, logit_bias, chunk_size)


def softmax_rows(
    rows: Float[Tensor, "rows z"],
    columns: Float[Tensor, "all z"],
    logit_scale: Scalar,
    logit_bias: Scalar | None,
    first: int,
    *,
    offset: int,
    duplicates: Duplicates | None,
) -> Scalar:
    """Return the mean cross-entropy of some rows, whose own columns begin at `first + offset`."""
    logits = logit_scale * rows @ columns.T + (0.0 if logit_bias is None else logit_bias)
    own = torch.arange(len(rows), device=rows.device) + first + offset
    if duplicates is None:
        return F.cross_entropy(logits, own)
    alike = duplicates.alike(first + offset, len(rows))
    if duplicates.count_as == "positives":
        return F.cross_entropy(logits, alike.to(logits) / alike.sum(1, keepdim=True))
    return F.cross_entropy(logits.masked_fill(alike.scatter(1, own[:, None], False), -torch.inf), own)


def sigmoid_rows(
    rows: Float[Tensor, "rows z"],
    columns: Float[Tensor, "all z"],
    logit_scale: Scalar,
    logit_bias: Scalar,
    first: int,
    *,
    offset: int,
    duplicates: Duplicates | None,
) -> Scalar:
    """Return the mean over some rows, whose own columns begin at `first + offset`, of the sum over all columns."""
    logits = logit_scale * rows @ columns.T + logit_bias
    signs = torch.full_like(logits, -1.0)
    each = torch.arange(len(rows), device=rows.device)
    signs[each, each + first + offset] = 1.0
    if duplicates is None:
        return -F.logsigmoid(signs * logits).sum() / len(rows)
    alike = duplicates.alike(first + offset, len(rows))
    if duplicates.count_as == "positives":
        return -F.logsigmoid(signs.masked_fill_(alike, 1.0) * logits).sum() / len(rows)
    return -F.logsigmoid(signs * logits).masked_fill(alike & (signs < 0), 0.0).sum() / len(rows)


def of_everyone(duplicates: Duplicates | None) -> Duplicates | None:
    """Return the duplicates of the global batch, where any are looked for."""
    return None if duplicates is None else duplicates.of_everyone()


LOSSES: dict[str, Callable[..., Tensor]] = {"clip": clip_loss, "siglip": siglip_loss}

# The parameter is the log of the multiplier. clip: open_clip's start, 1 / 0.07. siglip: the reference's ln 10 and -10.
LOGIT_SCALE_START = {"clip": 2.6592600369327783, "siglip": 2.302585092994046}
LOGIT_BIAS_START: dict[str, float | None] = {"clip": None, "siglip": -10.0}
