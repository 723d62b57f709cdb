"""Read pictures that lie in one folder per class as if they were shards, so that the same code scores both."""

from pathlib import Path

from softmoe_clip.data_pipelines.sources.class_folders import read_classes
from softmoe_clip.data_pipelines.tar_index import RawSample, ShardSet

EXTENSIONS = ("jpg", "jpeg", "png", "webp")


def open_data(pattern: str) -> "ShardSet | ClassFolders":
    """Open shards, or, where the pattern is a folder of folders without tars, class folders."""
    folder = Path(pattern)
    if folder.is_dir() and not any(folder.glob("*.tar")) and any(path.is_dir() for path in folder.iterdir()):
        return ClassFolders(folder)
    return ShardSet.open(pattern)


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
            for path in sorted((self.folder / name).rglob("*"))
            if path.suffix.lower().lstrip(".") in EXTENSIONS and path.is_file()
        ]
        if not self.files:
            raise ValueError(
                f"no pictures ({', '.join(EXTENSIONS)}) in the class folders of {self.folder}: check the path"
            )

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> RawSample:
        """Read one picture with its label (`cls`) and class name (`txt`); its key is its path inside the split."""
        path, label = self.files[index]
        inside = path.relative_to(self.folder)
        extension = path.suffix.lower().lstrip(".")
        members = {extension: path.read_bytes(), "cls": str(label).encode(), "txt": self.classnames[label].encode()}
        return RawSample(str(inside.with_suffix("")), inside.parts[0], members)
