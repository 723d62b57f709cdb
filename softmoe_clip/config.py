"""What a model and a training run are made of: frozen dataclasses, torch-free, filled from YAML and `a.b=value`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from softmoe_clip.data_pipelines.config import DataConfig

# The contrastive recipe of the reference (vmoe's LAION config): only weight matrices decay. First match wins.
CONTRASTIVE_DECAY = {
    r"router_scale|slot_embed|logit_scale|logit_bias": 0.0,
    r"bias|\.b_in$|\.b_out$": 0.0,
    r"(?i)norm|ln_|pos_embed|position|(token|word|class)_embedding|cls_token|latent|probe|gamma": 0.0,
    r".*": 0.1,
}


@dataclass(frozen=True)
class MoEConfig:
    """Which blocks of a tower get experts, how many, and how tokens reach them."""

    router: Literal["soft"] = "soft"
    layers: Any = "last_half"  # or a list of block numbers
    num_experts: int = 32
    slots_per_expert: int = 1
    normalize: bool = True

    def __post_init__(self):
        if min(self.num_experts, self.slots_per_expert) < 1:
            raise ValueError(f"a Soft MoE layer needs at least one expert and one slot, got {self}")
        is_block_list = not isinstance(self.layers, str) and all(isinstance(i, int) for i in self.layers)
        if self.layers != "last_half" and not is_block_list:
            raise ValueError(f"layers must be last_half or a list of blocks such as [3, 4, 5], got {self.layers!r}")


@dataclass(frozen=True)
class ModelConfig:
    """A two-tower model: an open_clip architecture, and the Soft MoE layers put into its towers.

    `arch` is a name in `configs/models`, an open_clip architecture, or a path to a JSON in open_clip's format.
    """

    arch: str
    image_moe: MoEConfig | None = None
    text_moe: MoEConfig | None = None  # for a bidirectional text tower: ours (`softmoe_text` in text_cfg), or SigLIP's
    start: Literal["reference", "quick"] = "reference"  # quick: for runs of minutes, see models/starts.py
    init_logit_scale: float | None = None  # the parameter, i.e. the log; None: what the loss starts from
    init_logit_bias: float | None = None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its decay rules (expression over parameter names: decay; the first match wins), its schedule in steps."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: dict[str, float] = field(default_factory=lambda: dict(CONTRASTIVE_DECAY))
    clip_norm: float = 1.0
    schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    warmup: int = 100
    cooldown: int = 0  # linear, to zero, over the last steps (rsqrt and constant)
    timescale: int = 10_000  # of rsqrt, in steps

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")
        if min(self.warmup, self.cooldown) < 0 or self.timescale < 1:
            raise ValueError(f"optim.warmup and optim.cooldown count steps from 0, timescale from 1, got {self}")


@dataclass(frozen=True)
class EvalConfig:
    """When to measure during training (every so many steps, and at the end), and with which suite."""

    every: int = 0
    suite: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """One run: what is trained, on what, how long, and where it is written."""

    out: str
    model: ModelConfig
    data: DataConfig
    # open_clip: the one that the architecture names, else CLIP's BPE; or a folder of transformers' or of ours, or a
    # sentencepiece file
    tokenizer: str = "open_clip"
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    loss: Literal["clip", "siglip"] = "siglip"
    batch_size: int = 256  # global: all processes together
    steps: int | None = None
    samples: int | None = None
    seed: int = 0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    log_every: int = 10
    checkpoint_every: int = 200
    keep_last: int = 2

    def __post_init__(self):
        if (self.steps is None) == (self.samples is None):
            raise ValueError(f"give a budget: either steps or samples, got steps={self.steps}, samples={self.samples}")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, since a contrastive loss compares pairs; got {self.batch_size}"
            )
        if self.last_step < 1:
            raise ValueError(f"the budget holds no step: samples={self.samples} with batch_size={self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.keep_last < 1 or self.log_every < 1:
            raise ValueError(f"keep_last and log_every count from 1, got {self.keep_last} and {self.log_every}")

    @property
    def last_step(self) -> int:
        """The number of the last optimizer step; a budget in samples is rounded down to whole batches."""
        return self.steps if self.steps is not None else self.samples // self.batch_size


# What may change when a run goes on: how long, how fast, how often it reports. All else would make another run of it.
MAY_CHANGE_AT_RESUME = (
    "out",
    "steps",
    "samples",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "eval",
    "data.num_workers",
)


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one level with dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def find_config(path: str | Path) -> Path:
    """Return the path where it exists, else the packaged file of that name: `configs/...` works from any folder."""
    packaged = Path(__file__).parent / "configs" / str(path).removeprefix("configs/")
    return packaged if not Path(path).exists() and packaged.exists() else Path(path)
