"""What the picture of a training position becomes: a random crop, the whole picture, or features computed before.

All three are called with (bytes, number of the sample, generator of the position) and may be sent to a worker.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.transforms import Augment, decode_crop

Picture = Callable[[bytes, int, np.random.Generator], Tensor]


@dataclass(frozen=True)
class RandomCrop:
    """A uint8 crop (3, r, r), augmented by draws of the position alone."""

    image_size: int
    augment: Augment

    def __call__(self, data: bytes, sample: int, rng: np.random.Generator) -> Tensor:
        return decode_crop(data, self.image_size, self.augment, rng)


@dataclass(frozen=True)
class Whole:
    """What evaluation sees: the model's own transform, a float (3, r, r) that is normalised already."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, data: bytes, sample: int, rng: np.random.Generator) -> Tensor:
        return self.transform(decode_rgb(data))


@dataclass
class Features:
    """Rows of a folder that `embed --features trunk` wrote, instead of pictures: float (d,), mapped, not loaded."""

    folder: str

    def __call__(self, data: bytes, sample: int, rng: np.random.Generator) -> Tensor:
        row = int(np.searchsorted(self.samples, sample))
        if row == len(self.samples) or self.samples[row] != sample:
            raise ValueError(f"no image features in {self.folder}")
        part, inside = divmod(row, self.meta["rows_per_file"])
        return torch.from_numpy(self.parts[part][inside].astype(np.float32))

    def __reduce__(self):
        return Features, (self.folder,)  # a mapped file would be sent to a worker with all its rows

    @cached_property
    def meta(self) -> dict:
        """What `embed` wrote about the rows; raises ValueError for a folder of something else."""
        try:
            meta = json.loads((Path(self.folder) / "meta.json").read_text("utf-8"))
        except (OSError, ValueError):
            raise ValueError(f"data.image_features: {self.folder} is no folder that `embed` wrote") from None
        if meta.get("features") != "trunk":
            raise ValueError(
                f"data.image_features: {self.folder} holds unit vectors; write it with `embed --features trunk`"
            )
        return meta

    @cached_property
    def samples(self) -> np.ndarray:
        """The sample number of each row, ascending."""
        import pyarrow.parquet as pq

        files = sorted((Path(self.folder) / "metadata").glob("*.parquet"))
        return np.concatenate([pq.read_table(file, columns=["sample"])["sample"].to_numpy() for file in files])

    @cached_property
    def parts(self) -> list[np.ndarray]:
        return [np.load(file, mmap_mode="r") for file in sorted((Path(self.folder) / "img_emb").glob("*.npy"))]

    def check_shards(self, shards: ShardSet) -> None:
        """Refuse features of other pictures than those of `shards`."""
        if [Path(url).resolve() for url in shards.urls] != [Path(url).resolve() for url in self.meta["shards"]]:
            raise ValueError(f"data.image_features: {self.folder} was made of other shards than data.train names")
