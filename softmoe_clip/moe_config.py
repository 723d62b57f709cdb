"""Which blocks of a tower get experts, and what each router can be told. Torch-free."""

from dataclasses import dataclass, fields
from math import inf
from typing import Any, Literal

_SLOTS = {"num_experts", "slots_per_expert"}
_CAPACITY = {"num_experts", "capacity_factor", "capacity_rounding", "capacity_multiple_of", "noise_std", "group_size"}
# What each router makes use of, beside `layers`; anything else that is set is refused.
ROUTER_SETTINGS = {
    "soft": {*_SLOTS, "normalize", "activation", "shared_expert"},
    "uniform": _SLOTS,
    "identity": _SLOTS,
    "soft_uniform": {*_SLOTS, "normalize"},
    "uniform_soft": {*_SLOTS, "normalize"},
    "tokens_choice": {*_CAPACITY, "top_k", "bpr", "importance_loss", "load_loss", "gshard_loss"},
    "experts_choice": _CAPACITY,
    "hash": {"num_experts"},
    "sinkhorn": _CAPACITY,
    "base": {"num_experts", "group_size"},
    "dense": {"num_experts"},  # a plain MLP has none: there, so that one config can be trained with and without
}


@dataclass(frozen=True)
class MoEConfig:
    """Which blocks of a tower get experts, how many, and how tokens reach them.

    Soft routers share `slots_per_expert` slots out; sparse ones have as many as `capacity_factor` gives, rounded and
    then raised to a multiple, in a routing group of `group_size` images. The losses are weights of what is added to
    the training loss; the load loss exists only where there is noise.
    """

    router: Literal[
        "soft",
        "uniform",
        "identity",
        "soft_uniform",
        "uniform_soft",
        "tokens_choice",
        "experts_choice",
        "hash",
        "sinkhorn",
        "base",
        "dense",
    ] = "soft"
    layers: Any = "last_half"  # or a list of block numbers
    num_experts: int = 32
    slots_per_expert: int = 1
    normalize: bool = True
    top_k: int = 1  # experts that a token chooses
    capacity_factor: float = 1.0
    capacity_rounding: Literal["ceil", "round"] = "ceil"
    capacity_multiple_of: int = 4
    bpr: bool = False  # batch-priority routing: the surest tokens choose first
    noise_std: float = 0.0  # on the gates' logits, in training, times 1 / num_experts; V-MoE takes 1
    group_size: int = 1
    importance_loss: float = 0.005
    load_loss: float = 0.005
    gshard_loss: float = 0.0
    activation: Literal["gelu_tanh", "gelu", "quick_gelu"] = "gelu_tanh"  # of the experts; the reference's is gelu_tanh
    shared_expert: bool = False  # the dense MLP stays, and the experts' output is added to its own

    def __post_init__(self):
        if min(self.num_experts, self.slots_per_expert) < 1:
            raise ValueError(
                "a Soft MoE layer needs at least one expert and one slot, "
                f"got num_experts={self.num_experts}, slots_per_expert={self.slots_per_expert}"
            )
        is_block_list = isinstance(self.layers, list | tuple) and all(type(i) is int for i in self.layers)
        if self.layers != "last_half" and not is_block_list:
            raise ValueError(f"layers must be last_half or a list of blocks such as [3, 4, 5], got {self.layers!r}")
        if is_block_list and len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers names a block twice: {list(self.layers)}")
        if self.router not in ROUTER_SETTINGS:
            raise ValueError(f"router must be one of {', '.join(ROUTER_SETTINGS)}, got {self.router!r}")
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name not in {"router", "layers", *ROUTER_SETTINGS[self.router]} and value != setting.default:
                raise ValueError(f"the router {self.router} has no use for {setting.name}={value!r}: leave it out")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be between 1 and the {self.num_experts} experts, got {self.top_k}")
        if not 0 < self.capacity_factor < inf or min(self.capacity_multiple_of, self.group_size) < 1:
            raise ValueError(
                "capacity_factor must be above 0 and finite, capacity_multiple_of and group_size 1 or more, "
                f"got {self.capacity_factor}, {self.capacity_multiple_of} and {self.group_size}"
            )
        for name in ("noise_std", "importance_loss", "load_loss", "gshard_loss"):
            if not 0 <= (weight := getattr(self, name)) < inf:
                raise ValueError(f"{name} must be 0 or more and finite, got {weight}")
        if self.noise_std == 0 and self.load_loss not in (0, MoEConfig.load_loss):
            raise ValueError(f"load_loss={self.load_loss} does nothing without noise: set noise_std, or leave it out")
