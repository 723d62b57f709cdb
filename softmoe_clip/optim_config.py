"""How a run learns: optimizer and schedule, averaged weights, a teacher. Torch-free."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

# The contrastive recipe of the reference (vmoe's LAION config): only weight matrices decay. First match wins.
CONTRASTIVE_DECAY = {
    r"router_scale|slot_embed|logit_scale|logit_bias": 0.0,
    r"bias|\.b_in$|\.b_out$": 0.0,
    r"(?i)norm|ln_|pos_embed|position|(token|word|class)_embedding|cls_token|latent|probe|gamma": 0.0,
    r".*": 0.1,
}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its decay rules (expression over parameter names: decay; first match wins), its schedule in steps.

    `name` is adamw (torch's, fused) or any that timm.optim knows, to which weight decay means what it means there.
    """

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9  # these three are adamw's; any other optimizer has its own, which `options` change
    beta2: float = 0.999
    eps: float = 1e-8
    options: dict[str, Any] = field(default_factory=dict)  # more of the optimizer's own arguments, by name
    weight_decay: dict[str, float] = field(default_factory=lambda: dict(CONTRASTIVE_DECAY))
    # Factors on lr: by expressions over parameter names (first match wins, 1 without one), as in {"^visual[.]": 0.1};
    # and by depth: decay ** d for a tower's block that has d - 1 blocks above it, the deepest for embeddings (BEiT).
    lr_scale: dict[str, float] = field(default_factory=dict)
    image_layer_decay: float | None = None
    text_layer_decay: float | None = None
    clip_norm: float = 1.0  # of all gradients together; 0: none is clipped
    schedule: Literal["cosine", "rsqrt", "constant"] = "cosine"
    warmup: int = 100
    cooldown: int = 0  # linear, to zero, over the last steps (rsqrt and constant)
    timescale: int = 10_000  # of rsqrt, in steps

    def __post_init__(self):
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr must be above 0, got {self.lr}")
        if not self.clip_norm >= 0:
            raise ValueError(f"optim.clip_norm must be 0, for no clipping, or more; got {self.clip_norm}")
        self.check_schedule()
        for pattern, decay in self.weight_decay.items():
            if not 0 <= decay < math.inf:
                raise ValueError(f"optim.weight_decay must be 0 or more, got {decay} for {pattern!r}")
        check_expressions("optim.weight_decay", [*self.weight_decay])
        for pattern, factor in self.lr_scale.items():
            if not 0 < factor < math.inf:
                raise ValueError(
                    f"optim.lr_scale must be above 0, got {factor} for {pattern!r}: name what is not to be trained in "
                    "freeze, which saves its optimizer state, too"
                )
        check_expressions("optim.lr_scale", [*self.lr_scale])
        for tower in ("image", "text"):
            decay = getattr(self, f"{tower}_layer_decay")
            if decay is not None and not 0 < decay <= 1:
                raise ValueError(f"optim.{tower}_layer_decay must be above 0 and at most 1, got {decay}")
        self.check_options()

    def check_schedule(self) -> None:
        """Refuse numbers of steps that are none, and those that the schedule would not look at."""
        if min(self.warmup, self.cooldown) < 0 or self.timescale < 1:
            raise ValueError(
                "optim.warmup and optim.cooldown count steps from 0, timescale from 1, "
                f"got {self.warmup}, {self.cooldown} and {self.timescale}"
            )
        if self.schedule == "cosine" and self.cooldown:
            raise ValueError(
                f"optim.cooldown={self.cooldown} is for the schedules rsqrt and constant: cosine falls to 0 by itself"
            )
        if self.schedule != "rsqrt" and self.timescale != OptimConfig.timescale:
            raise ValueError(f"optim.timescale={self.timescale} is for the schedule rsqrt, not {self.schedule}")

    def check_options(self) -> None:
        """Refuse an option that has a setting of its own, and adamw's settings where wrong or for another optimizer."""
        own = {"lr": "lr", "weight_decay": "weight_decay"}
        if self.name == "adamw":
            if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps >= 0):
                raise ValueError(
                    "optim.beta1 and optim.beta2 are 0 or more and below 1, optim.eps is 0 or more, "
                    f"got {self.beta1}, {self.beta2} and {self.eps}"
                )
            own |= {"betas": "beta1 and optim.beta2", "eps": "eps", "fused": "name, since adamw is always fused"}
        for option in own.keys() & self.options.keys():
            raise ValueError(f"optim.options.{option} has a setting of its own: optim.{own[option]}")
        for setting in fields(self):
            if setting.name in ("beta1", "beta2", "eps") and self.name != "adamw":
                value = getattr(self, setting.name)
                if value != setting.default:
                    raise ValueError(
                        f"optim.{setting.name}={value} is a setting of adamw, not of {self.name}: set it back to "
                        f"{setting.default}, and give {self.name} its own in optim.options"
                    )


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of what is trained: average = decay * average + (1 - decay) * weights.

    It is written beside the model, as RUN/model_ema, and is what evaluation during training measures.
    """

    decay: float = 0.9999  # of one update
    every: int = 1  # steps between updates
    warmup: bool = True  # decay is at most (1 + u) / (10 + u) at update u, so that a short run forgets its start

    def __post_init__(self):
        if not 0 <= self.decay < 1 or self.every < 1:
            raise ValueError(f"ema.decay is 0 or more and below 1, ema.every counts from 1, got {self}")


@dataclass(frozen=True)
class DistillConfig:
    """Learn from another model (a teacher): its softmax over the texts, and the pictures, of a global batch.

    The teacher is shown the same pixels, resized and normalised its own way, and the same captions.
    """

    model: str  # whatever `eval` takes: a run, a model folder, or one of open_clip's
    weight: float = 1.0  # of the term that is added to the contrastive loss

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise ValueError(f"distill.weight must be above 0, got {self.weight}: leave distill out to train without")


def check_expressions(setting: str, patterns: Sequence[str]) -> None:
    """Refuse what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{setting}: {pattern!r} is no regular expression ({error})") from None
