"""Read pictures that lie in one folder per class as if they were shards, so that the same code scores both."""

from pathlib import Path

from softmoe_clip.data_pipelines.sources.class_folders import (
    LISTING,
    captioned,
    folders_of,
    has_pictures,
    read_classes,
)
from softmoe_clip.data_pipelines.sources.items import PICTURES, SPLITS, files_below
from softmoe_clip.data_pipelines.sources.read import tables_of
from softmoe_clip.data_pipelines.tar_index import RawSample, ShardSet
from softmoe_clip.data_pipelines.tar_walk import PICTURE_EXTENSIONS


def open_data(pattern: str) -> "ShardSet | ClassFolders":
    """Open shards, or, where the pattern is a folder of folders without tars, class folders."""
    folder = Path(pattern)
    if folder.is_dir() and not any(folder.glob("*.tar")) and folders_of(folder):
        check_classes_inside(folder)
        return ClassFolders(folder)
    return ShardSet.open(pattern)


def check_classes_inside(folder: Path) -> None:
    """Refuse a folder whose folders are splits, of classes or of shards, and one of pictures with captions."""
    if (folder.parent / LISTING).is_file():
        return
    inside = folders_of(folder)
    of_shards = any(any(path.glob("*.tar")) for path in inside) and not has_pictures(folder)
    of_classes = (folder / LISTING).is_file() and any(folders_of(path) for path in inside)
    if of_shards or of_classes or all(path.name in SPLITS for path in inside):
        names = ", ".join(path.name for path in inside)
        raise ValueError(f"{folder} is a folder of splits: name one of its folders ({names})")
    if (tables := tables_of(folder)) or captioned([folder]):
        where = tables[0].name if tables else ".txt files"
        raise ValueError(f"{folder} holds captions ({where}), not classes: pack it first, and name the shards here")


class ClassFolders:
    """Pictures under `<split>/<class>/`; names and order of the classes from `classes.json` beside the split.

    Without a classes.json the sorted folder names are the class names, `_` read as a space. It has what `eval_batches`
    needs of a ShardSet: a length, and `read`, which gives label and class name (as caption) with the picture's bytes.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.classnames, labels = read_classes(self.folder)
        self.files = [
            (path, label)
            for name, label in labels.items()
            for path in files_below(self.folder / name)
            if path.suffix.lower() in PICTURES and path.is_file()
        ]
        if not self.files:
            raise ValueError(f"no pictures in the class folders of {self.folder}: check the path")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> RawSample:
        """Read one picture with its label (`cls`) and class name (`txt`); its key is its path inside the split."""
        path, label = self.files[index]
        inside = path.relative_to(self.folder)
        extension = path.suffix.lower().lstrip(".")
        if extension not in PICTURE_EXTENSIONS:
            extension = PICTURE_EXTENSIONS[0]  # the decoder looks at the bytes, not at the name
        members = {extension: path.read_bytes(), "cls": str(label).encode(), "txt": self.classnames[label].encode()}
        return RawSample(str(inside.with_suffix("")), inside.parts[0], members)
