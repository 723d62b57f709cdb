"""Data sets of torchvision by name, such as torchvision:CIFAR10: labels become captions, captions stay."""

import inspect
import io
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

from softmoe_clip.data_pipelines.sources.items import Prompts, Source, SourceItem, clean, mixed, plain_prompt

PREFIX = "torchvision:"
# What sets call a split; the first that a set knows is taken, since its trainval holds its train and its val.
SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
FILE_LISTS = ("samples", "_samples", "_image_files", "_images", "imgs")


class Part(NamedTuple):
    """One split of a torchvision data set: what has to be said to open it."""

    dataset: str
    root: str
    split: str | None
    arguments: tuple[tuple[str, Any], ...]

    def open(self, download: bool = False) -> Any:
        return open_part(self, download)


class TorchvisionPicture(NamedTuple):
    """A picture that torchvision keeps in memory; its bytes are a PNG of it."""

    part: Part
    index: int

    def __call__(self) -> bytes:
        file = io.BytesIO()
        self.part.open()[self.index][0].convert("RGB").save(file, "PNG")
        return file.getvalue()


def read_torchvision(source: str, root: Path, prompts: Prompts = plain_prompt) -> Source:
    """List the pictures of `torchvision:NAME`, kept in ROOT, or downloaded to it where there is a network.

    Raises ValueError for an unknown name, for sets of other things than labelled or captioned pictures, and where
    neither files nor a network are there.
    """
    name = source.removeprefix(PREFIX)
    items, classnames = [], []
    for part, dataset in known_parts(name, root):
        classnames = [str(n) for n in getattr(dataset, "classes", [])] or classnames
        targets, files = targets_of(name, dataset), files_of(dataset)
        for index, target in enumerate(targets):
            named = f"{part.split or name}/{index:07d}"
            path, read = (files[index], None) if files else (root, TorchvisionPicture(part, index))
            if isinstance(target, int):
                item = SourceItem(named, path, (), part.split, {}, label=target, read=read)
            else:
                item = SourceItem(named, path, clean(target), part.split, {}, read=read)
            items.append(item)
    labels = {item.label for item in items if item.label is not None}
    if labels and max(labels) >= len(classnames):
        classnames = [str(label) for label in range(max(labels) + 1)]
    captions = {label: clean(prompts(classnames[label])) for label in labels}
    items = [item if item.label is None else item._replace(captions=captions[item.label]) for item in items]
    return Source(mixed(items), tuple(classnames) if labels else ())


def parts_of(name: str, root: Path) -> list[Part]:
    """List the splits of a data set as its arguments tell: `train=True/False`, `split="..."`, or none at all."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)):
        close = [other for other in datasets.__all__ if other.lower() == name.lower()]
        advice = f"did you mean {close[0]}?" if close else "see torchvision.datasets, for example CIFAR10 or Food101"
        raise ValueError(f"torchvision has no data set {name!r}: {advice}")
    takes = inspect.signature(kind).parameters
    if "root" not in takes:
        raise ValueError(f"{PREFIX}{name} has no files: use a data set that has")
    if "train" in takes:
        return [Part(name, str(root), split, (("train", split == "train"),)) for split in ("train", "test")]
    if "split" in takes:
        return [Part(name, str(root), split, (("split", given),)) for split in SPLITS for given in SPLITS[split]]
    return [Part(name, str(root), None, ())]


def known_parts(name: str, root: Path) -> list[tuple[Part, Any]]:
    """Open each split once, by the first of its names that the data set knows; where it has no train, say so."""
    found: dict[str | None, tuple[Part, Any]] = {}
    for part in parts_of(name, root):
        if part.split not in found and (dataset := opened(part)) is not None:
            found[part.split] = part, dataset
    if not found:
        names = ", ".join(given for names in SPLITS.values() for given in names)
        raise ValueError(f"{PREFIX}{name} has none of the splits {names}: use a data set that has")
    if not found.keys() & {"train", None}:
        print(
            f"{PREFIX}{name} has no split {' or '.join(SPLITS['train'])}: there are only {', '.join(map(str, found))}, "
            "take training pictures from another source",
            file=sys.stderr,
        )
    return list(found.values())


def opened(part: Part) -> Any:
    """Open a split, downloading what is missing; None for a split that the data set does not have."""
    from torchvision import datasets

    try:
        return part.open()
    except ValueError as error:
        if part.split is not None and "Unknown value" in str(error):
            return None
        raise
    except ImportError as error:
        raise ValueError(f"{PREFIX}{part.dataset} needs the package {error.name}: install it first") from error
    except (RuntimeError, FileNotFoundError, TypeError) as error:
        if "download" not in inspect.signature(getattr(datasets, part.dataset)).parameters:
            reason = " ".join(str(error).split())
            raise ValueError(f"{PREFIX}{part.dataset} is not in {part.root} ({reason}): put it there") from error
    try:
        return part.open(download=True)
    except (URLError, OSError, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "reason", error)).split())
        raise ValueError(
            f"{PREFIX}{part.dataset} is not in {part.root} and can't be downloaded ({reason}): "
            "put its files there, or name their folder with --root"
        ) from error


@lru_cache(maxsize=4)
def open_part(part: Part, download: bool) -> Any:
    """Make the data set, once in each process."""
    from torchvision import datasets

    more = {"download": True} if download else {}
    return getattr(datasets, part.dataset)(part.root, **dict(part.arguments), **more)


def targets_of(name: str, dataset: Any) -> list[int | list[str]]:
    """Return the label or the captions of each picture, without decoding any where the set has a list of them."""
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            targets = list(found)
            break
    else:
        targets = [dataset[index][1] for index in range(len(dataset))]
    targets = [[target] if isinstance(target, str) else target for target in targets]
    if all(isinstance(target, list | tuple) and all(isinstance(text, str) for text in target) for target in targets):
        return [list(target) for target in targets]
    try:
        return [int(target) for target in targets]
    except (TypeError, ValueError):
        raise ValueError(
            f"{PREFIX}{name} has neither one class nor captions for each picture: use a data set that has"
        ) from None


def files_of(dataset: Any) -> list[Path]:
    """Return the files of the pictures, where each is a file of its own: their bytes are kept then."""
    for attribute in FILE_LISTS:
        found = getattr(dataset, attribute, None)
        if isinstance(found, list) and found and len(found) == len(dataset):
            entries = [entry[0] if isinstance(entry, tuple) else entry for entry in found]
            if isinstance(entries[0], str | Path) and Path(entries[0]).is_file():
                return [Path(entry) for entry in entries]
    return []
