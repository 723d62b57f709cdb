"""Get a whole file from a URL: checked for its length, within time limits, tried again when the connection fails.

http and https go through the standard library (fsspec would need aiohttp for them, and hides how long a body is); s3,
gs, hf, memory and the rest through fsspec.
"""

import errno
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

TRIES = 5
FIRST_PAUSE = 1.0  # seconds; each one is twice as long
TIMEOUT = 30.0  # seconds without a byte
SLOWEST = 1024  # bytes per second, over TIMEOUT
CHUNK = 1 << 20
PASSING = {408, 425, 429, *range(500, 600)}  # answers of a server that may change soon
NEVER = threading.Event()


class Missing(ValueError):
    """There is no such file, or not for us, or no room for it: trying again would not help."""


class Stopped(Exception):
    """Nobody wants the file any more."""


def fetch(
    url: str, path: str | Path, room: Callable[[int], None] = lambda size: None, stopped: threading.Event = NEVER
) -> None:
    """Write the file at a URL to `path`, whole; after an error nothing is left there.

    `room` is called with the size before anything is written. Raises Missing, or ValueError after some tries.
    """
    try:
        _tried(url, lambda: _download(url, Path(path), room, stopped), stopped)
    except BaseException as error:
        Path(path).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a write does not say where
        raise


def read_url(url: str) -> bytes:
    """Return the content of a small file at a URL. Raises as `fetch` does."""

    def read() -> bytes:
        with _opened(url) as (file, size):
            content = file.read()
        _check_length(len(content), size)
        return content

    return _tried(url, read, NEVER)


def size_of(url: str) -> int | None:
    """Return how many bytes a file at a URL has, None where the server does not say. Raises as `fetch` does."""

    def look() -> int | None:
        with _opened(url) as (_, size):
            return size

    return _tried(url, look, NEVER)


def _tried(url: str, work: Callable, stopped: threading.Event):
    """Do it until it succeeds, with longer and longer pauses between tries."""
    reason = ""
    for number in range(TRIES):
        if number and stopped.wait(FIRST_PAUSE * 2 ** (number - 1)):
            raise Stopped
        try:
            return work()
        except (Missing, Stopped):
            raise
        except ImportError as error:
            raise ValueError(f"{url} needs a package that is not installed: {_one_line(error)}") from None
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in PASSING:
                raise Missing(f"{url} is not to be had ({error.code} {error.reason}): check the address") from None
            reason = f"the server answered {error.code} {error.reason}"
        except (FileNotFoundError, PermissionError) as error:
            raise Missing(f"{url} is not to be had ({_one_line(error)}): check the address") from None
        except Exception as error:  # each kind of storage has its own; connections fail in a dozen ways
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            reason = _one_line(getattr(error, "reason", None) or error)
    raise ValueError(
        f"{url} could not be fetched in {TRIES} tries ({reason}): check the network, then start the same command again"
    )


@contextmanager
def _opened(url: str) -> Iterator[tuple[BinaryIO, int | None]]:
    """Open a URL for reading, and say how many bytes it has where that is known."""
    if url.startswith(("http://", "https://")):
        # A compressed body would have another length than the file.
        headers = {"User-Agent": "softmoe-clip", "Accept-Encoding": "identity"}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            yield response, int(length) if length is not None else None
        return
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ValueError as error:
        raise Missing(f"{url} is no URL that can be read: {_one_line(error)}") from None
    size = system.info(path).get("size")
    with system.open(path, "rb") as file:
        yield file, size


def _download(url: str, path: Path, room: Callable[[int], None], stopped: threading.Event) -> None:
    with _opened(url) as (source, size):
        room(size or 0)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb") as target:
            written, since, since_written = 0, time.monotonic(), 0
            take = getattr(source, "read1", source.read)  # what is there already, instead of waiting for a whole chunk
            while chunk := take(CHUNK):
                if stopped.is_set():
                    raise Stopped
                target.write(chunk)
                written += len(chunk)
                if (seconds := time.monotonic() - since) > TIMEOUT:
                    if written - since_written < SLOWEST * seconds:
                        raise TimeoutError(f"fewer than {SLOWEST:,} bytes per second")
                    since, since_written = time.monotonic(), written
            _check_length(written, size)
            target.truncate()
            target.flush()
            os.fsync(target.fileno())


def _check_length(found: int, expected: int | None) -> None:
    if expected is not None and found != expected:
        raise HTTPException(f"the connection was cut after {found:,} of {expected:,} bytes")


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
