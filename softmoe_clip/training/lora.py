"""Low-rank adapters (LoRA, arXiv 2106.09685), by the peft package: put in before a run, merged into what it writes."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from softmoe_clip.config import LoraConfig
from softmoe_clip.moe.experts import Experts
from softmoe_clip.training.freeze import found

ADAPTER = "default"  # what peft calls the only one
LINEAR = ("weight",)  # what is adapted of a linear layer, in its own way; other weights are adapted where they are


def add_adapters(model: nn.Module, config: LoraConfig, freeze: Sequence[str], seed: int) -> None:
    """Put adapters into a model, in place, and train only them and what `also_train` finds and `freeze` does not.

    The adapted model computes what it did before, since B starts at zero; A is drawn from the seed alone. Raises
    ValueError for an expression that finds nothing, or what cannot be adapted, before anything is changed.
    """
    targets = find_targets(model, config.targets)
    lone = {name: weights for name, weights in targets.items() if weights != LINEAR}
    if lone and config.dropout:
        name, weights = next(iter(lone.items()))
        raise ValueError(f"lora.dropout is for linear layers, not for {name}.{weights[0]}: set it to 0")
    kept = found(model, freeze, "freeze").keys() | {f"{name}.{w}" for name, weights in targets.items() for w in weights}
    also_trained = found(model, config.also_train, "lora.also_train")
    also_trained = [p for name, p in also_trained.items() if p.requires_grad and name not in kept]
    torch.manual_seed(seed)
    inject(model, targets, config)
    for parameter in also_trained:  # `inject` has turned off all but adapters
        parameter.requires_grad_(True)


def find_targets(model: nn.Module, patterns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the modules to adapt, by name, and which of their weights; an expression must fit a whole name."""
    targets: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        is_found = False
        for name, module in model.named_modules():
            weights = adaptable(module)
            if re.fullmatch(pattern, name):
                if not weights:
                    raise ValueError(
                        f"lora.targets: {pattern!r} finds {name}, which can have no adapter "
                        f"({type(module).__name__}){hint(name, module)}"
                    )
            else:
                weights = tuple(weight for weight in weights if re.fullmatch(pattern, f"{name}.{weight}"))
            if weights:
                targets[name] = tuple(sorted({*targets.get(name, ()), *weights}))
                is_found = True
        if not is_found:
            raise ValueError(f"lora.targets: {pattern!r} is the whole name of no module{hint('', model)}")
    return targets


def adaptable(module: nn.Module) -> tuple[str, ...]:
    """Name the weights of a module that can have an adapter."""
    # torch's attention reads this layer's weight and never calls it: an adapter there would do nothing.
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return ()
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, Experts):
        return ("w_in", "w_out")
    # Not as peft 0.21 adapts torch's attention: it adds what out_proj learns twice, but differentiates it once, and
    # its base weights drift by rounding, being changed and changed back in every forward pass.
    return ("in_proj_weight",) if isinstance(getattr(module, "in_proj_weight", None), nn.Parameter) else ()


def hint(name: str, module: nn.Module) -> str:
    """Name something inside a module that can have an adapter, as the end of a complaint."""
    inside = (f"{name}.{inner}".strip(".") for inner, part in module.named_modules() if inner and adaptable(part))
    example = next(inside, None)
    return "" if example is None else f"; {example} could"


def inject(model: nn.Module, targets: dict[str, tuple[str, ...]], config: LoraConfig) -> None:
    """Let peft put its layers in place of the targets."""
    try:
        import peft
    except ImportError:
        raise ValueError("lora needs the peft package: pip install 'softmoe-clip[lora]'") from None

    settings = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    if linears := [re.escape(name) for name, weights in targets.items() if weights == LINEAR]:
        peft.inject_adapter_in_model(peft.LoraConfig(target_modules="|".join(linears), **settings), model, ADAPTER)
    for name, weights in targets.items():
        if weights != LINEAR:
            # In the module around it: from the root, peft would take every name that ends like this one, too.
            around, _, own = name.rpartition(".")
            names = [f"{own}.{weight}" for weight in weights]
            wanted = peft.LoraConfig(target_modules=[], target_parameters=names, **settings)
            peft.inject_adapter_in_model(wanted, model.get_submodule(around), ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state with adapters added to what they adapt, under the names that it had without them."""
    state = {plain(name): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            weight = plain(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")
            with torch.no_grad():
                # Off the GPU, which might not hold what is adapted a second time.
                state[weight] = (state[weight] + layer.get_delta_weight(ADAPTER)).cpu()
    return state


def plain(name: str) -> str:
    """Take peft's wrappers out of a name."""
    return name.replace(".base_layer", "")
