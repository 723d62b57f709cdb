"""Pairs of one global batch that share a caption or a picture, and what a contrastive loss is to make of them."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from softmoe_clip.data_pipelines.loader import Batch
from softmoe_clip.training.distributed import gather


@dataclass(frozen=True)
class Duplicates:
    """Whether pairs that are alike count as positives or are left out, and the ids that say which are.

    Two pairs are alike when their captions or their pictures have one id; each pair is like itself. This is no
    equivalence: one may share its caption with a second and its picture with a third. Where captions alone repeat,
    `clip` with positives is `clip` with negatives: equal texts have equal logits, so the sum over them is the same.
    """

    count_as: Literal["positives", "masked"]
    caption_ids: Int64[Tensor, " b"]
    picture_ids: Int64[Tensor, " b"]

    def of_everyone(self) -> "Duplicates":
        """Return the ids of all processes, in rank order."""
        caption_ids, picture_ids = gather(torch.stack([self.caption_ids, self.picture_ids], dim=1)).unbind(1)
        return Duplicates(self.count_as, caption_ids.contiguous(), picture_ids.contiguous())

    def alike(self, first: int, num_rows: int) -> Bool[Tensor, "rows all"]:
        """Compare some consecutive pairs, the rows, with all."""
        rows = slice(first, first + num_rows)
        same_caption = self.caption_ids[rows, None] == self.caption_ids
        return same_caption.logical_or_(self.picture_ids[rows, None] == self.picture_ids)


def duplicates_of(
    batch: Batch, count_as: Literal["negatives", "positives", "masked"], device: torch.device
) -> Duplicates | None:
    """Return what the loss needs to know of this process's part of a batch; nothing where duplicates are negatives."""
    if count_as == "negatives":
        return None
    ids = (ids.to(device, non_blocking=True) for ids in (batch.caption_ids, batch.picture_ids))
    return Duplicates(count_as, *ids)
