"""The two contrastive losses, each equal to its single-process value whatever the batch is split over."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from softmoe_clip.training.distributed import gather_with_grad, local_offset

Features = Float[Tensor, "b z"]


def clip_loss(
    image: Features, text: Features, logit_scale: Float[Tensor, ""], logit_bias: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Return the softmax loss of CLIP (arXiv 2103.00020) over the global batch, for this process's unit vectors.

    The mean over processes is the single-process loss, and DDP's averaged gradients are its gradients. A bias
    cancels in the softmax; adding it all the same keeps DDP from finding a parameter without gradient.
    """
    targets = torch.arange(len(image), device=image.device) + local_offset(len(image))
    shift = 0.0 if logit_bias is None else logit_bias
    image_logits = logit_scale * image @ gather_with_grad(text).T + shift
    text_logits = logit_scale * text @ gather_with_grad(image).T + shift
    return (F.cross_entropy(image_logits, targets) + F.cross_entropy(text_logits, targets)) / 2


def siglip_loss(
    image: Features, text: Features, logit_scale: Float[Tensor, ""], logit_bias: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Return the sigmoid loss of SigLIP (arXiv 2303.15343): summed over the texts of a row, mean over the pictures."""
    logits = logit_scale * image @ gather_with_grad(text).T + logit_bias
    signs = torch.full_like(logits, -1.0)
    rows = torch.arange(len(image), device=image.device)
    signs[rows, rows + local_offset(len(image))] = 1.0
    return -F.logsigmoid(signs * logits).sum() / len(image)


LOSSES: dict[str, Callable[..., Tensor]] = {"clip": clip_loss, "siglip": siglip_loss}

# The parameter is the log of the multiplier. clip: open_clip's start, 1 / 0.07. siglip: the reference's ln 10 and -10.
LOGIT_SCALE_START = {"clip": 2.6592600369327783, "siglip": 2.302585092994046}
LOGIT_BIAS_START: dict[str, float | None] = {"clip": None, "siglip": -10.0}
