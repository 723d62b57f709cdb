"""Optimizers by name with first-match decay rules, and learning-rate schedules as plain functions of the step."""

import inspect
import math
import re
from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from softmoe_clip.config import OptimConfig
from softmoe_clip.optim_config import CONTRASTIVE_DECAY
from softmoe_clip.training.freeze import found
from softmoe_clip.training.optimizer_state import rehearse, rehearse_shares
from softmoe_clip.training.rates import rate_factors, refuse_unreached
from softmoe_clip.training.sharding import mesh_of

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


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict]:
    """Return the trainable parameters in groups, one for each weight decay and factor on the learning rate.

    Raises ValueError for a decay rule that finds no parameter, but for the default's, which are for all kinds of model,
    and for one that is never reached.
    """
    found(model, [pattern for pattern in config.weight_decay if pattern not in CONTRASTIVE_DECAY], "optim.weight_decay")
    refuse_unreached(model, config.weight_decay, "optim.weight_decay")
    factors = rate_factors(model, config)
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Fused kernels take shares and whole tensors apart only: a native CLIP has both where it is sharded.
            kind = decay_of(name, config.weight_decay), factors[name], isinstance(parameter, DTensor)
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": factor}
        for (decay, factor, _), parameters in groups.items()
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer that `optim.name` names, over the trainable parameters.

    Raises ValueError, one sentence, for a name or an option that is not known, or state that could not be resumed.
    """
    if config.name == "adamw":
        return adamw(model, config)
    from timm.optim import create_optimizer_v2

    check_name(config.name)
    check_options(config)
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in config.options.items()}

    def make(groups: list[dict]) -> torch.optim.Optimizer:
        return create_optimizer_v2(groups, config.name, lr=config.lr, **options)

    mesh = mesh_of(model)
    try:
        rehearse(make)
        if mesh is not None:
            rehearse_shares(make, mesh)
    except (ValueError, TypeError, AssertionError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or f"it fails ({type(error).__name__})"
        where = "here" if mesh is None else "with sharding=full"
        raise ValueError(f"optim.name={config.name} cannot be used {where}: {reason}") from None
    return make(parameter_groups(model, config))


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; decay is multiplied by the rate."""
    if config.options:
        check_options(config)
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,  # one pass over memory: on CPU too it is the fastest form, and expert weights are many
        **config.options,
    )


def check_name(name: str) -> None:
    """Refuse a name that timm does not know, with the nearest that it does; `lookahead_` may stand before it."""
    from timm.optim import list_optimizers

    known = list_optimizers()
    plain = name.removeprefix("lookahead_")
    if plain not in known:
        raise ValueError(
            f"no optimizer is called {name!r}: did you mean {get_close_matches(plain, known, n=1, cutoff=0)[0]!r}?"
        )


def check_options(config: OptimConfig) -> None:
    """Refuse an option that the optimizer's own signature does not have."""
    from timm.optim import get_optimizer_info

    cls = get_optimizer_info(config.name.removeprefix("lookahead_")).opt_class
    if isinstance(cls, str):  # of a package that may be missing, which the rehearsal will tell
        return
    known = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "params")]
    for name in config.options:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"optim.options.{name} is no setting of {config.name}: {advice}")
