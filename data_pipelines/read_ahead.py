"""Tell the system which shards come next while the loader reads, so that disks see long sequential reads."""

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from queue import Empty, SimpleQueue

from softmoe_clip.data_pipelines.mixture import Mixture
from softmoe_clip.data_pipelines.tar_index import ShardSet

STEP = 128 * 1024  # Linux cuts a request at the disk's read-ahead size, by default this
SHARE_OF_MEMORY = 0.5


class ReadAhead:
    """Has the next window's shards read into the page cache, as far as the loader has come in this one.

    Entered when the iteration begins and called with the number of each batch; the work is done by a thread. Where the
    system has no such call, or two windows would not fit into memory, it does nothing.
    """

    def __init__(self, shards: ShardSet, order: Mixture, start: int, batch_size: int):
        self.shards, self.order, self.start, self.batch_size = shards, order, start, batch_size
        self.told: dict[tuple[int, ...], int] = {}  # bytes of each window
        self.wanted: SimpleQueue[tuple[str, int, int]] = SimpleQueue()
        self.stopped = threading.Event()
        windowed = [source for source in order.orders if not source.is_one_window]
        num_shards = 2 * sum(source.window for source in windowed)
        largest = sum(sorted((part.num_bytes for part in shards.parts), reverse=True)[:num_shards])
        fits = hasattr(os, "posix_fadvise") and largest < SHARE_OF_MEMORY * memory()
        self.is_useful = fits and bool(windowed)

    def __enter__(self) -> "ReadAhead":
        if self.is_useful:
            threading.Thread(target=self.work, daemon=True, name="read-ahead").start()
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()

    def __call__(self, number: int) -> None:
        if not self.is_useful:
            return
        at = self.order.windows_at(self.start + number * self.batch_size)
        parts = [part for now in at for part in ((tuple(now.shards), 1.0), (tuple(now.following), now.share))]
        before, self.told = self.told, {}
        for window, part in parts:
            sizes = [self.shards.parts[shard].num_bytes for shard in window]
            start = before.get(window, 0)
            self.told[window] = max(start, int(part * sum(sizes)))
            for shard, *span in spans(zip(window, sizes, strict=True), start, self.told[window]):
                self.wanted.put((self.shards.urls[shard], *span))

    def work(self) -> None:
        """Ask for one span after the other, until the iteration ends."""
        while not self.stopped.is_set():
            with suppress(Empty, OSError):  # a shard that is gone is the loader's to complain about
                url, start, end = self.wanted.get(timeout=0.5)
                self.advise(url, start, end)

    def advise(self, url: str, start: int, end: int) -> None:
        """Ask for some bytes of a file, in steps that the system does not cut."""
        descriptor = os.open(url, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset in range(start, end, STEP):
                if self.stopped.is_set():
                    return
                os.posix_fadvise(descriptor, offset, min(STEP, end - offset), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def spans(files: Iterable[tuple[int, int]], start: int, end: int) -> list[tuple[int, int, int]]:
    """Cut bytes start to end of files laid end to end, given as (file, size), into (file, start, end) of each."""
    found, before = [], 0
    for file, size in files:
        first, last = max(start - before, 0), min(end - before, size)
        if first < last:
            found.append((file, first, last))
        before += size
    return found


def memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
