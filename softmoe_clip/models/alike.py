"""How two models differ, in weights, settings or tokenizers, in a few words: torch lists every name of a weight."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]

PROBES = ("a photo of a dog on the beach", "Two red circles, 3 blue squares.")


def shapes_of(state: Mapping) -> dict[str, list[int]]:
    """Return the shape of each tensor of a state."""
    return {name: list(tensor.shape) for name, tensor in state.items()}


def shapes_in(file: Path) -> dict[str, list[int]]:
    """Return the shape of each tensor in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118  not a dict


def differences(ours: Shapes, theirs: Shapes, may_miss: Collection[str] = ()) -> str:
    """Name the first weight that theirs lack, the first that ours do not have, the first of another shape."""
    missing = sorted(ours.keys() - theirs.keys() - set(may_miss))
    extra = sorted(theirs.keys() - ours.keys() - set(may_miss))
    other = [name for name in ours if name in theirs and list(ours[name]) != list(theirs[name])]
    return "; ".join(
        [
            *(f"it has no {name}" for name in missing[:1]),
            *(f"it has {name} too" for name in extra[:1]),
            *(f"{name} is {list(theirs[name])} there, {list(ours[name])} here" for name in other[:1]),
        ]
    )


def same_tokenizer(ours: Callable, theirs: Callable) -> bool:
    """Tell whether two tokenizers give the same ids, for a few sentences, whatever the length of their rows."""
    return all(agree(ours([text])[0], theirs([text])[0]) for text in PROBES)


def agree(ours: Int64[Tensor, " l"], theirs: Int64[Tensor, " k"]) -> bool:
    """Tell whether two rows of ids may be of one tokenizer, where one row may be longer."""
    length = min(len(ours), len(theirs))
    if len(ours) != len(theirs):
        length -= 1  # where the shorter one may have its end token
    return torch.equal(ours[:length], theirs[:length])
