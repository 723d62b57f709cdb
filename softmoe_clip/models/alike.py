"""How the weights of two models differ, in a few words: torch lists every name, over many lines."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

Shapes = Mapping[str, Sequence[int]]


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
