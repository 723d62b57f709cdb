"""Replace a model folder by a new one at once, or not at all, whatever happens on the way."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softmoe_clip.data_pipelines.full_disk import raise_if_full
from softmoe_clip.data_pipelines.new_folder import sync


@contextmanager
def replaced_folder(folder: Path, mark: str) -> Iterator[Path]:
    """Yield a hidden folder beside `folder` and put it in its place at the end; on any error remove it.

    What is there is replaced only if it holds the file `mark`, and only moved aside until the new one is in place;
    `restore_previous` undoes a death between.
    """
    folder = folder.absolute()
    restore_previous(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose a folder to write the model into")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
        raise ValueError(f"{folder} holds something that is no model: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, previous = beside(folder, "partial"), beside(folder, "previous")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in (*partial.iterdir(), partial):
            sync(file)
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            os.rename(folder, previous)
        os.rename(partial, folder)
        sync(folder.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        restore_previous(folder)
        raise_if_full(error, folder)
        raise


def restore_previous(folder: Path) -> None:
    """Bring back the folder that a process which died inside `replaced_folder` had moved aside."""
    folder = folder.absolute()
    if not folder.exists() and beside(folder, "previous").exists():
        os.rename(beside(folder, "previous"), folder)


def beside(folder: Path, role: str) -> Path:
    """Name a hidden sibling of a folder."""
    return folder.with_name(f".{folder.name}.{role}")
