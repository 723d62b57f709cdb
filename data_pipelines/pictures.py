"""What the picture of a training position becomes: a random crop, the whole picture, or features computed before.

All three are called with (bytes, number of the sample, generator of the position) and may be sent to a worker.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.transforms import Augment, decode_crop

MAKE_IT = "make it again with `softmoe-clip embed MODEL SHARDS FOLDER --features trunk`"
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
        file = Path(self.folder) / "meta.json"
        try:
            meta = json.loads(file.read_text("utf-8"))
        except OSError:
            raise ValueError(f"data.image_features: {self.folder} is no folder that `embed` wrote: {MAKE_IT}") from None
        except ValueError:
            raise ValueError(f"data.image_features: {file} is no JSON: {MAKE_IT}") from None
        if not isinstance(meta, dict) or meta.get("features") != "trunk":
            raise ValueError(f"data.image_features: {file} tells of no trunk features: {MAKE_IT}")
        if lacking := [name for name in ("fingerprint", "num_rows", "width", "rows_per_file") if name not in meta]:
            raise ValueError(f"data.image_features: {file} does not tell {', '.join(lacking)}: {MAKE_IT}")
        return meta

    @cached_property
    def samples(self) -> np.ndarray:
        """The sample number of each row, ascending."""
        import pyarrow.parquet as pq

        def column(file: Path) -> np.ndarray:
            return pq.read_table(file, columns=["sample"])["sample"].to_numpy()

        return np.concatenate(self.open_parts("metadata/metadata_{:04d}.parquet", column))

    @cached_property
    def parts(self) -> list[np.ndarray]:
        return self.open_parts("img_emb/img_emb_{:04d}.npy", partial(np.load, mmap_mode="r"), self.meta["width"])

    def open_parts(self, name: str, open_part: Callable[[Path], np.ndarray], *width: int) -> list[np.ndarray]:
        """Open all files of a kind; raises ValueError for one that is missing, damaged or not as meta.json tells."""
        num_rows, most = self.meta["num_rows"], self.meta["rows_per_file"]
        opened = []
        for part, first in enumerate(range(0, num_rows, most)):
            file, expected = Path(self.folder) / name.format(part), (min(most, num_rows - first), *width)
            try:
                opened.append(open_part(file))
            except (OSError, EOFError, KeyError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(f"data.image_features: {file} cannot be read ({reason}): {MAKE_IT}") from None
            if (shape := opened[-1].shape) != expected:
                raise ValueError(
                    f"data.image_features: {file} holds {shape}, not {expected} as meta.json says: {MAKE_IT}"
                )
        return opened

    def check(self, shards: ShardSet) -> None:
        """Refuse features of other pictures than those of `shards`, wherever these lie, and a damaged folder."""
        if self.meta["fingerprint"] != shards.fingerprint():
            raise ValueError(
                f"data.image_features: {self.folder} was made of other shards than data.train names, "
                f"or of these before they were packed again: {MAKE_IT}"
            )
        assert len(self.parts) > 0  # all are opened
        if np.any(np.diff(self.samples) <= 0) or self.samples[-1] >= len(shards):
            raise ValueError(
                f"data.image_features: {self.folder}/metadata does not hold samples in their order: {MAKE_IT}"
            )

    def some_samples(self) -> list[int]:
        """Name the samples of the first, the middle and the last row."""
        return sorted({int(self.samples[row]) for row in (0, len(self.samples) // 2, -1)})
