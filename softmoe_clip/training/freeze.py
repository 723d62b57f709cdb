"""Parts of a model that a run leaves as they are: out of the optimizer, without gradients, in eval mode."""

import re
from collections.abc import Sequence

from torch import nn


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Stop training every parameter in whose name one of the regular expressions is found.

    Raises ValueError for an expression that is found nowhere, or when nothing but logit scale and bias is left.
    """
    for parameter in found(model, patterns, "freeze").values():
        parameter.requires_grad_(False)
    if not set(trained_names(model)) - {"logit_scale", "logit_bias"}:
        raise ValueError(f"freeze: {list(patterns)} leave nothing to train")


def found(model: nn.Module, patterns: Sequence[str], setting: str) -> dict[str, nn.Parameter]:
    """Return the parameters in whose names one of the expressions is found; ValueError for one found nowhere."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in parameters):
            raise ValueError(
                f"{setting}: {pattern!r} is found in no parameter name; one of them is {[*parameters][-1]}"
            )
    return {
        name: parameter
        for name, parameter in parameters.items()
        if any(re.search(pattern, name) for pattern in patterns)
    }


def trained_names(model: nn.Module) -> list[str]:
    """List the parameters that training changes."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def train_mode(model: nn.Module) -> None:
    """Put a model into train mode, but for what is frozen as a whole: no dropout there, no running statistics."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def in_words(model: nn.Module) -> str:
    """Say how much of each part is trained, in numbers: "visual 0 of 4,300,000, text 1,200 of 1,200"."""
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        counts = parts.setdefault(name.partition(".")[0], [0, 0])
        counts[0] += parameter.numel() * parameter.requires_grad
        counts[1] += parameter.numel()
    return ", ".join(f"{part} {trained:,} of {total:,}" for part, (trained, total) in parts.items())
