"""One process at a time may write a run: two that were started in one folder would cut each other's files."""

import os
import weakref
from pathlib import Path

from softmoe_clip.data_pipelines.new_folder import is_at

LOCK_FILE = ".lock"


class RunLock:
    """The right to write a run, in a `with`; it ends with its process at the latest, however that ends.

    Raises ValueError where another process has it.
    """

    def __init__(self, run: Path):
        self.file = run / LOCK_FILE
        descriptor = locked(self.file)
        while not is_at(self.file, descriptor):
            os.close(descriptor)
            descriptor = locked(self.file)
        self.close = weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *error) -> None:
        self.file.unlink(missing_ok=True)
        self.close()


def locked(file: Path) -> int:
    """Open and lock a file of its own: POSIX locks go when their process closes any descriptor of the file."""
    import fcntl

    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        # Not flock, which loader workers would inherit: they outlive a killed parent by seconds.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        raise ValueError(
            f"another process is training in {file.parent} right now: wait for it, or give another folder as out"
        ) from None
    except OSError:
        pass  # a file system that locks nothing
    return descriptor
