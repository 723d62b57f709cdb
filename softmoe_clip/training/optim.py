"""AdamW with first-match decay rules, and learning-rate schedules as plain functions of the step."""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from softmoe_clip.config import OptimConfig

Schedule = Callable[[int], float]


def schedule(config: OptimConfig, last_step: int) -> Schedule:
    """Return the learning rate as a function of the updates already done (0 before the first), as vmoe counts.

    Warmup is linear from 0. `rsqrt` falls as 1 / sqrt(1 + (t - warmup) / timescale); a cooldown is linear to 0 from the
    value at its start, which stays frozen (vmoe's train.schedule). `cosine` reaches 0 at the last step.
    """
    if config.warmup + config.cooldown > last_step:
        raise ValueError(
            f"optim.warmup {config.warmup} and optim.cooldown {config.cooldown} do not fit into {last_step} steps"
        )
    shapes = {
        "constant": lambda after: 1.0,
        "rsqrt": lambda after: 1 / math.sqrt(1 + after / config.timescale),
        "cosine": lambda after: 0.5 * (1 + math.cos(math.pi * after / max(1, last_step - config.warmup))),
    }
    shape, cooldown_start = shapes[config.schedule], last_step - config.cooldown

    def learning_rate(step: int) -> float:
        if step < config.warmup:
            return config.lr * step / config.warmup
        factor = shape(min(step, cooldown_start) - config.warmup)
        if config.cooldown and step > cooldown_start:
            factor *= max(0.0, (last_step - step) / config.cooldown)
        return config.lr * factor

    return learning_rate


def decay_of(name: str, rules: dict[str, float]) -> float:
    """Return the weight decay of a parameter: the first rule whose expression is found in its name."""
    for pattern, decay in rules.items():
        if re.search(pattern, name):
            return decay
    return 0.0


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters, one group for each weight decay; decay is multiplied by the rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(decay_of(name, config.weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,  # one pass over memory: on CPU too it is the fastest form, and expert weights are many
    )
