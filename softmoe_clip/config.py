"""What a model and a training run are made of: frozen dataclasses, torch-free, filled from YAML and `a.b=value`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from softmoe_clip.data_pipelines.config import DataConfig


@dataclass(frozen=True)
class MoEConfig:
    """Which blocks of a tower get experts, how many, and how tokens reach them."""

    router: Literal["soft"] = "soft"
    layers: Any = "last_half"
    num_experts: int = 32
    slots_per_expert: int = 1
    normalize: bool = True

    def __post_init__(self):
        if min(self.num_experts, self.slots_per_expert) < 1:
            raise ValueError(f"a Soft MoE layer needs at least one expert and one slot, got {self}")
        is_blocks = isinstance(self.layers, (list, tuple)) and all(isinstance(i, int) for i in self.layers)
        if self.layers != "last_half" and not is_blocks:
            raise ValueError(f"layers must be last_half or a list of block numbers such as [3, 4, 5], got {self.layers!r}")
