"""A folder with copies of remote shards, up to a size limit, shared by any number of processes."""

import fcntl
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from softmoe_clip.data_pipelines.fetch import NEVER, Missing, Stopped, fetch

DEFAULT_GIB = 50.0


def cache_folder() -> Path:
    """Return this user's folder for what can always be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softmoe-clip"


class ShardCache:
    """Whole files by URL. Beyond `gib` the least recently opened are removed, but none that a process reads from."""

    def __init__(self, folder: str | Path | None = None, gib: float = DEFAULT_GIB):
        self.folder = Path(folder or cache_folder() / "shards").expanduser()
        self.limit = int(gib * 2**30)

    def place(self, url: str) -> Path:
        """Return where the copy of a URL is, or will be: the files of one remote folder in one folder."""
        head, _, name = url.partition("?")[0].rpartition("/")
        beside = f"{head}?{urlsplit(url).query}"
        return self.folder / hashlib.sha256(beside.encode()).hexdigest()[:24] / unquote(name).replace("/", "_")

    def open(self, url: str) -> int:
        """Return a descriptor of the copy, fetched if need be; while it is open the copy is not removed."""
        while True:
            path = self.fetch(url)
            with suppress(FileNotFoundError):  # removed in between by another process
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                os.utime(descriptor)  # the time of the last use
                return descriptor

    def fetch(self, url: str, wait: bool = True, stopped: threading.Event = NEVER) -> Path | None:
        """Return the path of the copy, fetched if need be. Raises ValueError where it cannot be had.

        Without `wait`, return None if another process is fetching it, and raise Stopped if there is no room for it.
        """
        path = self.place(url)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(_lock_of(path), wait) as is_mine:
            if not is_mine:
                return None
            if not path.exists():
                fetch(url, _part_of(path), lambda size: self.make_room(size, url, must=wait), stopped)
                os.replace(_part_of(path), path)
        return path

    def make_room(self, size: int, url: str, must: bool = True) -> None:
        """Remove the least recently used copies until `size` more bytes fit, and hold them for this URL.

        Where all copies are in use the limit gives way to who `must` have one; for others Stopped is raised.
        """
        if size > self.limit:
            raise Missing(
                f"{url} has {size / 2**30:.2f} GiB, more than the whole cache of {self.limit / 2**30:.2f} GiB: "
                "raise data.cache_gib"
            )
        part = _part_of(self.place(url))
        with locked(self.folder / "room.lock"):
            others = [path for path in self.copies() if path != part]
            known = [(path, stat) for path in others if (stat := _stat(path))]
            left = self.limit - size - sum(stat.st_size for _, stat in known)
            for path, stat in sorted(known, key=lambda known: known[1].st_mtime):
                # A lock has no size; an index is small, and spares another fetch.
                if left < 0 and stat.st_size and path.suffix != ".npz" and _remove_unused(path):
                    left += stat.st_size
            if left < 0 and not must:
                raise Stopped
            with open(part, "ab") as file:
                file.truncate(size)

    def copies(self) -> Iterator[Path]:
        """List the files of the cache, which may lie in a folder with others: those in folders that `place` names."""
        for path in self.folder.glob("*/*"):
            if re.fullmatch("[0-9a-f]{24}", path.parent.name) and path.is_file() and not path.is_symlink():
                yield path


def release(descriptor: int) -> None:
    """Close what `open` returned; unlocked first, since a forked process may still hold it."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def locked(path: Path, wait: bool = True, create: int = os.O_CREAT) -> Iterator[bool]:
    """Hold a lock between processes and threads, given up by the system when a process dies; yield if it is held."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | create, 0o666)
    try:
        is_mine = _lock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        try:
            yield is_mine
        finally:
            if is_mine:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    return True


def _remove_unused(path: Path) -> bool:
    """Remove a copy that nobody has open, or what a killed process left of one."""
    lock = _lock_of(path.with_name(path.name.removesuffix(".part"))) if path.suffix == ".part" else path
    with suppress(FileNotFoundError), locked(lock, wait=False, create=0) as is_mine:
        if is_mine:
            path.unlink()
        return is_mine
    return False


def _stat(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
