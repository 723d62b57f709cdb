"""Find the names of the classes that a labelled set of pictures is scored against."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from softmoe_clip.data_pipelines.sources.items import read_text


def find_classnames(data: str, given: str | Sequence[str] | None) -> list[str]:
    """Return the given list, the given file's lines, `imagenet` (open_clip's 1,000), or else the data's classnames.txt.

    The file is looked for in the folder of the shards and in the folder above it (CLIP_benchmark's layout).
    """
    if given == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    if given is not None and not isinstance(given, str):
        if blank := [place for place, name in enumerate(given, 1) if not name.strip()]:
            raise ValueError(f"name {blank[0]} of the {len(given)} classnames is empty: every class needs a name")
        return list(given)
    if given is not None:
        return read_classnames(Path(given))
    first = Path(data.split("::")[0])
    folder = first if first.is_dir() else first.parent
    for place in (folder, folder.parent):
        if (place / "classnames.txt").is_file():
            return read_classnames(place / "classnames.txt")
    raise ValueError(f"no classnames.txt in {folder} or above it: write one name per line, in the order of the labels")


def read_classnames(path: Path) -> list[str]:
    """Read one name per line; blank lines at the end are dropped, one in between would shift every label after it."""
    names = [line.strip() for line in read_text(path).rstrip().splitlines()]
    if not names:
        raise ValueError(f"{path} holds no class names")
    if "" in names:
        raise ValueError(f"line {names.index('') + 1} of {path} is empty: every class needs a name")
    return names


def check_classes(num_classes: int, labels: np.ndarray) -> None:
    """Refuse a class list that is shorter than the labels need."""
    if num_classes <= (top := int(labels.max())):
        raise ValueError(
            f"label {top} has no name: the class list has {num_classes} names. "
            "Use the class list that was exported with these pictures."
        )
    if (low := int(labels.min())) < 0:
        raise ValueError(f"label {low} is negative: labels count from 0, in the order of the class list")
