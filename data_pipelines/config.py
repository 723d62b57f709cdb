"""What a run reads: shards, how captions are chosen, how pictures are cropped. Torch-free."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from softmoe_clip.data_pipelines.strict import load_strict


@dataclass(frozen=True)
class SourceConfig:
    """Shards that are one of several sources, and how often training draws from them: twice as often at weight 2."""

    shards: Any  # a folder, a pattern, or a list of them
    weight: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "shards", checked_shards(self.shards, "shards"))
        if not 0 < self.weight < math.inf:
            raise ValueError(f"a source's weight must be above 0, got {self.weight} for {self.shards}")


@dataclass(frozen=True)
class DataConfig:
    """Shards to train and validate on, and what is drawn from each sample."""

    train: (
        Any  # a folder, a pattern or a list of them; or a list of sources, as in [{shards: a, weight: 2}, {shards: b}]
    )
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
    cache: str | None = None  # a folder for copies of remote shards; None: this user's cache folder
    cache_gib: float = 50.0  # and how large it may get
    window: int = 32  # shards that are mixed with each other while the disk reads the next ones; 0: all of them

    def __post_init__(self):
        # omegaconf hands tuples over as lists; a frozen dataclass should stay hashable.
        object.__setattr__(self, "crop_scale", checked_crop_scale(self.crop_scale))
        object.__setattr__(self, "train", checked_train(self.train))
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
        if not self.cache_gib > 0:
            raise ValueError(f"data.cache_gib must be above 0, got {self.cache_gib}")
        if self.window < 0:
            raise ValueError(f"data.window must be a number of shards, or 0 for all, got {self.window}")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """What to train on, as sources; most often one."""
        is_mixed = isinstance(self.train, tuple) and isinstance(self.train[0], SourceConfig)
        return self.train if is_mixed else (SourceConfig(self.train),)


def checked_train(train: Any) -> str | tuple:
    """Return shards, or sources if there are mappings in the list; refuse anything else."""
    if not isinstance(train, (list, tuple)) or not any(isinstance(item, (dict, SourceConfig)) for item in train):
        return checked_shards(train, "data.train")
    sources = [load_strict(SourceConfig, item) if isinstance(item, dict) else item for item in train]
    if wrong := [source for source in sources if not isinstance(source, SourceConfig)]:
        raise ValueError(f"data.train mixes sources and patterns: write {wrong[0]!r} as {{shards: {wrong[0]}}}")
    return tuple(sources)


def checked_shards(shards: Any, key: str) -> str | tuple[str, ...]:
    """Return a pattern or several; refuse none, and anything else."""
    patterns = shards if isinstance(shards, (list, tuple)) else [shards]
    if shards is None or not all(patterns) or not patterns:
        raise ValueError(f"{key} is empty: give a folder of shards or a pattern such as shards/{{00..09}}.tar")
    if wrong := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise ValueError(f"{key} must be a folder or a pattern, or a list of them, got {wrong[0]!r}")
    return shards if isinstance(shards, str) else tuple(patterns)


def checked_crop_scale(crop_scale) -> tuple[float, float]:
    """Return the smallest and largest share of the picture's area as floats; refuse what is no such pair."""
    pair = tuple(float(share) for share in crop_scale)
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= 1:
        raise ValueError(f"data.crop_scale must be two shares of the area with 0 < low <= high <= 1, got {list(pair)}")
    return pair
