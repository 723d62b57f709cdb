"""Make an output folder, or a file, appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from softmoe_clip.data_pipelines.full_disk import MORE_SPACE, raise_if_full


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a hidden folder beside OUT and rename it to OUT at the end; on any error or Ctrl-C remove it.

    What an earlier process left there when it was killed is cleared. Raises ValueError for a non-empty OUT, OSError
    with one sentence for a full disk.
    """
    out = Path(out).absolute()
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(exist_ok=True)
    lock = lock_folder(partial, out)
    try:
        clear(partial)
        yield partial
        sync(partial)
        refuse_existing(out)
        os.rename(partial, out)
        sync(out.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise_if_full(error, out, f"nothing was kept, {MORE_SPACE}")
        raise
    finally:
        os.close(lock)


def refuse_existing(out: str | Path) -> None:
    """Refuse an output folder that holds something already, or that is a file."""
    out = Path(out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: choose another folder or remove it")
    refuse_file(out)


def refuse_file(folder: Path, advice: str = "choose a folder to write into") -> None:
    """Refuse a folder to be where a file is, or below one."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: {advice}")


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, also when the machine fails: it is on the disk before it takes its name.

    Half surrogates in a text, as in keys that are no UTF-8, become question marks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)
        sync(temporary)
        temporary.replace(file)
        sync(file.parent)
    except OSError as error:
        raise_if_full(error, file)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(partial: Path, out: Path) -> int:
    """The lock dies with its process, so that a folder left by a killed one is told from one in use."""
    import fcntl

    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        in_use = not is_at(partial, descriptor)
    except BlockingIOError:
        in_use = True
    except OSError:
        in_use = False  # some network file systems lock no folders: then only the check of OUT protects
    if in_use:
        os.close(descriptor)
        raise ValueError(f"another process is writing {out} right now: wait for it or choose another folder")
    return descriptor


def is_at(path: Path, descriptor: int) -> bool:
    """Return whether what a descriptor was opened on still has this name: whoever held its lock may have removed it."""
    return path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))


def clear(folder: Path) -> None:
    """Remove all that is in a folder."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
