"""Pictures in one folder per class, with captions made of the class names."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from softmoe_clip.data_pipelines.samples import readable
from softmoe_clip.data_pipelines.sources.items import (
    PICTURES,
    SPLITS,
    Prompts,
    Source,
    SourceItem,
    clean,
    files_below,
    mixed,
    plain_prompt,
)

LISTING = "classes.json"


def split_folders(folder: Path) -> dict[str | None, Path] | None:
    """Return the folders that hold the class folders, by split (None: the source names none); None for other sources.

    There are classes where a `classes.json` lies in the folder or beside it, and where pictures lie in two folders or
    more, and no .txt of the same name beside any of them.
    """
    inside = folders_of(folder)
    if (folder / LISTING).is_file():
        return {path.name: path for path in inside} or None
    own = folder.name if folder.name in SPLITS else None
    if inside and (folder.parent / LISTING).is_file():
        return {own: folder}
    if not inside or any(path.suffix.lower() in PICTURES for path in folder.iterdir()):
        return None
    if all(path.name in SPLITS for path in inside) and all(folders_of(path) for path in inside):
        splits = {path.name: path for path in inside}
    else:
        splits = {own: folder}
    classes = {path.name for split in splits.values() for path in folders_of(split) if has_pictures(path)}
    return splits if len(classes) > 1 and not captioned(splits.values()) else None


def has_pictures(folder: Path) -> bool:
    """Tell whether there is a picture anywhere below."""
    return any(path.suffix.lower() in PICTURES for path in files_below(folder))


def captioned(folders: Iterable[Path]) -> bool:
    """Tell whether any picture below has its own X.txt or X.jpg.txt beside it; other texts say nothing."""
    paths = [path for folder in folders for path in files_below(folder)]
    texts = {path.with_suffix("") for path in paths if path.suffix.lower() == ".txt"}
    return any(texts & {path, path.with_suffix("")} for path in paths if path.suffix.lower() in PICTURES)


def read_class_folders(splits: dict[str | None, Path], prompts: Prompts = plain_prompt) -> Source:
    """List the pictures of class folders with their labels; captions are what `prompts` makes of the class name."""
    classnames, labels = read_classes(*splits.values())
    captions = {label: clean(prompts(classnames[label])) for label in labels.values()}
    items = []
    for split, folder in splits.items():
        for name in sorted(path.name for path in folders_of(folder)):
            label = labels[name]
            for path in files_below(folder / name):
                if path.suffix.lower() in PICTURES:
                    inside = path.relative_to(folder if split is None else folder.parent).as_posix()
                    extra = {"class_name": classnames[label]}
                    items.append(SourceItem(inside, path, captions[label], split, extra, label=label))
    return Source(mixed(items), tuple(classnames))


def read_classes(*folders: Path) -> tuple[list[str], dict[str, int]]:
    """Return the class names in order of their labels, and the label of each class folder that is there.

    They come from the `classes.json` beside the given folders; without one, the sorted names of the folders in them
    are the class names, `_` read as a space.
    """
    inside = sorted({path.name for folder in folders for path in folders_of(folder)})
    listing = folders[0].parent / LISTING
    if not listing.is_file():
        return [readable(name).replace("_", " ") for name in inside], {name: label for label, name in enumerate(inside)}
    names, labels = read_listing(listing)
    if unknown := [name for name in inside if name not in labels]:
        where = next(folder / unknown[0] for folder in folders if (folder / unknown[0]).is_dir())
        raise ValueError(f"the folder {where} is no class of {listing}: add it there or move it away")
    return names, {name: labels[name] for name in inside}


def read_listing(listing: Path) -> tuple[Sequence[str], dict[str, int]]:
    """Read {"classes": [{"index": 0, "dir": "n01440764", "name": "tench"}, ...]}: names, and labels by folder."""
    try:
        classes = sorted(json.loads(listing.read_text("utf-8-sig"))["classes"], key=lambda entry: entry["index"])
        names = [readable(entry["name"]) for entry in classes]
        labels = {entry["dir"]: entry["index"] for entry in classes}
        in_order = [entry["index"] for entry in classes] == list(range(len(classes)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{listing} is not a list of classes with index, dir and name ({error!r})") from None
    if not in_order:
        raise ValueError(f"the class indices in {listing} must be 0, 1, 2, ... without gaps")
    return names, labels


def folders_of(folder: Path) -> list[Path]:
    """List the folders in a folder, sorted, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
