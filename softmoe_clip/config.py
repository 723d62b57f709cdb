"""What a model and a training run are made of: frozen dataclasses, torch-free, filled from YAML and `a.b=value`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from softmoe_clip.data_pipelines.config import DataConfig
from softmoe_clip.moe_config import ROUTER_SETTINGS, MoEConfig  # noqa: F401
from softmoe_clip.optim_config import (  # noqa: F401  the parts of a run's config are imported from here
    CONTRASTIVE_DECAY,
    DistillConfig,
    EmaConfig,
    OptimConfig,
    check_expressions,
)

LARGEST_START = 80  # of logit scale and bias; float32 holds its exponential


@dataclass(frozen=True)
class ModelConfig:
    """A two-tower model: an open_clip architecture, and the Soft MoE layers put into its towers.

    `arch` is a name in `configs/models`, an open_clip architecture, or a path to a JSON in open_clip's format.
    """

    arch: str
    image_moe: MoEConfig | None = None
    text_moe: MoEConfig | None = None  # for a bidirectional text tower: ours (`softmoe_text` in text_cfg), or SigLIP's
    # a folder of transformers' whose pretrained encoder takes the place of the text tower in `arch`, with its tokenizer
    text_tower: str | None = None
    context_length: int | None = None  # ids of a caption that the text tower takes; None: as `arch` says
    start: Literal["reference", "quick"] = "reference"  # quick: for runs of minutes, see models/starts.py
    # the parameter, i.e. the log; None: what the model of `init` has, without one what the loss starts from
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None

    def __post_init__(self):
        for name in ("init_logit_scale", "init_logit_bias"):
            value = getattr(self, name)
            if value is not None and not abs(value) < LARGEST_START:
                raise ValueError(f"model.{name} must be between -{LARGEST_START} and {LARGEST_START}, got {value}")
        if self.context_length is not None and self.context_length < 2:
            raise ValueError(f"model.context_length must be 2 or more, got {self.context_length}")


# What is trained beside adapters: logit scale and bias, and the projections, by whatever name a tower gives its own.
SCALES_AND_PROJECTIONS = r"^logit_|^visual[.](head|proj)|^(text[.])?(head|proj|text_projection)"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: each weight W that is named becomes W + alpha / rank * B A, and only B and A are trained.

    `targets` are regular expressions for whole names: of linear layers, of the input projection of an attention, of
    experts, or of the modules that hold these two. `also_train` is searched in the names of parameters, which are
    trained as a whole, unless they have an adapter or `freeze` finds them; all else stays as it is.
    """

    targets: tuple[str, ...]
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of what goes into the adapters of linear layers
    also_train: tuple[str, ...] = (SCALES_AND_PROJECTIONS,)

    def __post_init__(self):
        if not self.targets:
            raise ValueError("lora.targets is empty: name what gets adapters, or leave lora out")
        if self.rank < 1 or not 0 < self.alpha < float("inf") or not 0 <= self.dropout < 1:
            raise ValueError(
                "lora.rank counts from 1, alpha is above 0, dropout is 0 or more and below 1, "
                f"got {self.rank}, {self.alpha} and {self.dropout}"
            )
        check_expressions("lora.targets", self.targets)
        check_expressions("lora.also_train", self.also_train)


@dataclass(frozen=True)
class EvalConfig:
    """When to measure during training (every so many steps, and at the end), and with which suite."""

    every: int = 0
    suite: str | None = None

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"eval.every must be 0 or more, got {self.every}")


# What Accelerate knows; each but tensorboard is a package of its own.
Tracker = Literal["tensorboard", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"]


@dataclass(frozen=True)
class TrainConfig:
    """One run: what is trained, on what, how long, and where it is written."""

    out: str  # a folder, or a URL that fsspec can write (s3://..., gs://...)
    model: ModelConfig
    data: DataConfig
    # open_clip: the one that the architecture names, else CLIP's BPE; or a folder of transformers' or of ours, or a
    # sentencepiece file
    tokenizer: str = "open_clip"
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    loss: Literal["clip", "siglip"] = "siglip"
    # what pairs of one global batch are to each other that have the same caption or the same picture
    duplicates: Literal["negatives", "positives", "masked"] = "negatives"
    batch_size: int = 256  # global: all processes together
    chunk_size: int | None = None  # pairs a process runs through its towers at once; None: all of its part of the batch
    steps: int | None = None
    samples: int | None = None
    seed: int = 0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    expert_parallel: int = 1  # neighbouring processes that share one set of experts out, for towers too large for one
    # full: each process holds its share of weights, gradients and optimizer state, and of every layer's experts
    sharding: Literal["none", "full"] = "none"
    grad_checkpointing: bool = False  # keep the inputs of blocks only, and compute them again in the backward pass
    compile: bool = False  # by torch.compile, which needs a C++ compiler on CPU and takes a while to begin
    # a model to start from: a run, a model folder, or one of open_clip's; or a checkpoint of a run,
    # RUN/checkpoints/step_00001000, which is gone on from as its run would have (see training/branch.py)
    init: str | None = None
    freeze: tuple[str, ...] = ()  # regular expressions; what they find in the parameters' names is not trained
    lora: LoraConfig | None = None  # low-rank adapters; a parameter that is not named there is then not trained either
    ema: EmaConfig | None = None  # averaged weights, beside the trained ones
    distill: DistillConfig | None = None  # learn from another model's similarities, too
    log_every: int = 10
    checkpoint_every: int = 200
    keep_last: int = 2  # of the newest checkpoints
    keep_every: int = 0  # and for good each checkpoint at a multiple of so many steps; 0: none
    working_folder: str | None = None  # where a run at a URL is trained; None: a folder in this user's cache
    trackers: tuple[Tracker, ...] = ("tensorboard",)  # where numbers go beside metrics.jsonl

    def __post_init__(self):
        if (self.steps is None) == (self.samples is None):
            raise ValueError(f"give a budget: either steps or samples, got steps={self.steps}, samples={self.samples}")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, since a contrastive loss compares pairs; got {self.batch_size}"
            )
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size counts pairs from 1, got {self.chunk_size}: leave it out for no chunks")
        if self.last_step < 1:
            raise ValueError(f"the budget holds no step: samples={self.samples} with batch_size={self.batch_size}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be 0 to 2**63 - 1, got {self.seed}")
        if self.loss == "clip" and self.model.init_logit_bias is not None:
            raise ValueError("model.init_logit_bias is for loss=siglip: a softmax gives the same with any bias")
        if self.keep_last < 1 or self.log_every < 1:
            raise ValueError(f"keep_last and log_every count from 1, got {self.keep_last} and {self.log_every}")
        for name in ("keep_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.keep_every and (not self.checkpoint_every or self.keep_every % self.checkpoint_every):
            raise ValueError(
                f"keep_every must be a multiple of checkpoint_every, got {self.keep_every} and {self.checkpoint_every}"
            )
        self.check_places()
        check_expressions("freeze", self.freeze)
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers names one twice: {', '.join(self.trackers)}")
        if self.expert_parallel < 1:
            raise ValueError(f"expert_parallel counts processes from 1, got {self.expert_parallel}")
        if self.expert_parallel > 1:
            self.check_expert_parallel()
        if self.sharding == "full":
            self.check_sharding()

    def check_places(self) -> None:
        """Refuse to write where nothing can be written, and to start from what is not on this machine."""
        if self.out.startswith(("http://", "https://")) or ("://" in self.out and "::" in self.out):
            raise ValueError(f"out: {self.out} cannot be written: give a folder, or a URL such as s3://bucket/run")
        if self.working_folder is not None and "://" not in self.out:
            raise ValueError(f"working_folder is for a run at a URL, but out is the folder {self.out}: leave it out")
        if "://" in (self.init or ""):
            raise ValueError(
                f"init takes a folder of this machine (a run, a checkpoint in one, a model) or a model of open_clip's, "
                f"not the URL {self.init}: copy that folder here and give its path"
            )

    def check_expert_parallel(self) -> None:
        """Refuse what spread experts cannot do."""
        if self.precision == "fp16":
            raise ValueError("expert_parallel cannot skip steps in all processes alike, as fp16 must: take bf16")
        if self.lora is not None:
            raise ValueError("expert_parallel has no adapters for experts: leave lora or expert_parallel out")
        if self.optim.name != "adamw":
            raise ValueError(f"expert_parallel needs optim.name=adamw: {self.optim.name} may look at whole tensors")

    def check_sharding(self) -> None:
        """Refuse what cannot be shared out."""
        if self.expert_parallel > 1:
            raise ValueError("sharding=full and expert_parallel do not go together: leave one of both out")
        if self.precision == "fp16":
            raise ValueError("sharding=full cannot skip steps in all processes alike, as fp16 must: take bf16")
        if self.lora is not None:
            raise ValueError(
                "sharding=full has no adapters, whose gradients and state are small: leave one of both out"
            )
        if self.data.image_features is not None:
            raise ValueError("sharding=full needs pictures, not data.image_features: leave one of both out")

    @property
    def last_step(self) -> int:
        """The number of the last optimizer step; a budget in samples is rounded down to whole batches."""
        return self.steps if self.steps is not None else self.samples // self.batch_size


# What may change when a run goes on: how long, how fast, how often it reports. All else would make another run of it.
MAY_CHANGE_AT_RESUME = (
    "out",
    "working_folder",
    "steps",
    "samples",
    "chunk_size",
    "expert_parallel",
    "sharding",
    "grad_checkpointing",
    "compile",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "keep_every",
    "trackers",
    "eval",
    "data.num_workers",
    "data.cache",
)
# What may lie in another folder then, as staged data does; fingerprints tell whether it holds the same. Held-out pairs
# have none: like the suite they change what is measured, not the run.
MAY_MOVE_AT_RESUME = ("data.train", "data.val", "data.image_features", "tokenizer")


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
