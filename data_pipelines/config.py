"""What a run reads: shards, how captions are chosen, how pictures are cropped. Torch-free."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Shards to train and validate on, and what is drawn from each sample."""

    train: str
    val: str | None = None
    caption: Literal["random", "first"] = "random"
    # Share of the picture's area: the random crop of the Soft MoE recipe (paper, appendix F).
    crop_scale: tuple[float, float] = (0.05, 1.0)
    flip: bool = False
    num_workers: int = 2
    shuffle_captions: bool = False  # a control: pictures with captions of others, which must teach nothing
    # crop: random crops; none: the whole picture as evaluation sees it, which is also what `image_features` holds.
    augment: Literal["crop", "none"] = "crop"
    image_features: str | None = None  # a folder of `embed --features trunk`, taken instead of pictures (LiT)
    window: int = 32  # shards that are mixed with each other while the disk reads the next ones; 0: all of them

    def __post_init__(self):
        # omegaconf hands tuples over as lists; a frozen dataclass should stay hashable.
        object.__setattr__(self, "crop_scale", checked_crop_scale(self.crop_scale))
        if not self.train:
            raise ValueError("data.train is empty: give a folder of shards or a pattern such as shards/{00..09}.tar")
        if self.caption not in ("random", "first"):
            raise ValueError(f"data.caption must be random or first, got {self.caption!r}")
        if self.augment not in ("crop", "none"):
            raise ValueError(f"data.augment must be crop or none, got {self.augment!r}")
        if self.augment == "none" and self.flip:
            raise ValueError("data.augment is none, but data.flip is true: pictures cannot be mirrored then")
        if self.image_features is not None and self.augment != "none":
            raise ValueError("data.image_features are those of whole pictures: set data.augment=none with it")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers must be 0 or more, got {self.num_workers}")
        if self.window < 0:
            raise ValueError(f"data.window must be a number of shards, or 0 for all, got {self.window}")


def checked_crop_scale(crop_scale) -> tuple[float, float]:
    """Return the smallest and largest share of the picture's area as floats; refuse what is no such pair."""
    pair = tuple(float(share) for share in crop_scale)
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= 1:
        raise ValueError(f"data.crop_scale must be two shares of the area with 0 < low <= high <= 1, got {list(pair)}")
    return pair
