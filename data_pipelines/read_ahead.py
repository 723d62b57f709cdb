"""Prepare the shards that come next while the loader reads: disks see long sequential reads, networks no pauses."""

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from queue import SimpleQueue

from softmoe_clip.data_pipelines.fetch import Stopped
from softmoe_clip.data_pipelines.mixture import Mixture, Window
from softmoe_clip.data_pipelines.shards import is_remote
from softmoe_clip.data_pipelines.tar_index import ShardSet

STEP = 128 * 1024  # Linux cuts a request at the disk's read-ahead size, by default this
SHARE_OF_MEMORY = 0.5
FETCHERS = 4


class ReadAhead:
    """Has the next window's shards read into the page cache, as far as the loader has come in this one; fetches remote.

    Entered when the iteration begins and called with the number of each batch; the work is done by threads. Local
    shards are left to the system where that has no such call, or where two windows would not fit into memory.
    """

    def __init__(self, shards: ShardSet, order: Mixture, start: int, batch_size: int):
        self.shards, self.order, self.start, self.batch_size = shards, order, start, batch_size
        self.told: dict[tuple[int, ...], int] = {}  # bytes of each window
        self.fetched: set[str] = set()
        self.wanted: SimpleQueue[tuple[str, int, int] | None] = SimpleQueue()
        self.wanted_copies: SimpleQueue[str | None] = SimpleQueue()
        self.stopped = threading.Event()
        windowed = [source for source in order.orders if not source.is_one_window]
        num_shards = 2 * sum(source.window for source in windowed)
        largest = sum(sorted((shards.num_bytes(i) for i in range(len(shards.urls))), reverse=True)[:num_shards])
        fits = hasattr(os, "posix_fadvise") and largest < SHARE_OF_MEMORY * memory()
        self.advises = fits and bool(windowed)
        self.fetches = any(map(is_remote, shards.urls))

    def __enter__(self) -> "ReadAhead":
        targets = [self.advise_wanted] * self.advises + [self.fetch_wanted] * FETCHERS * self.fetches
        for target in targets:
            threading.Thread(target=target, daemon=True, name="read-ahead").start()
        return self

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self.wanted.put(None)
        for _ in range(FETCHERS):
            self.wanted_copies.put(None)

    def __call__(self, number: int) -> None:
        if self.advises or self.fetches:
            at = self.order.windows_at(self.start + number * self.batch_size)
            self.want_pages(at)
            self.want_copies(at)

    def want_pages(self, at: list[Window]) -> None:
        """Ask for what is left of the local shards of each window, and for the same share of the next one."""
        if not self.advises:
            return
        parts = [part for now in at for part in ((tuple(now.shards), 1.0), (tuple(now.following), now.share))]
        before, self.told = self.told, {}
        for window, part in parts:
            sizes = [self.shards.num_bytes(shard) for shard in window]
            start = before.get(window, 0)
            self.told[window] = max(start, int(part * sum(sizes)))
            for shard, *span in spans(zip(window, sizes, strict=True), start, self.told[window]):
                self.wanted.put((self.shards.urls[shard], *span))

    def want_copies(self, at: list[Window]) -> None:
        """Ask for the remote shards of each window, and then of the next ones."""
        wanted = [now.shards for now in at] + [now.following for now in at]
        urls = [self.shards.urls[shard] for shards in wanted for shard in shards if is_remote(self.shards.urls[shard])]
        for url in dict.fromkeys(urls):
            if url not in self.fetched:
                self.wanted_copies.put(url)
        self.fetched = set(urls)

    def advise_wanted(self) -> None:
        """Ask the system for one span after the other, until the iteration ends."""
        while (span := self.wanted.get()) is not None and not self.stopped.is_set():
            with suppress(OSError):  # a shard that is gone is the loader's to complain about
                self.advise(*span)

    def fetch_wanted(self) -> None:
        """Fetch one shard after the other, until the iteration ends; one that another process fetches is left to it."""
        while (url := self.wanted_copies.get()) is not None and not self.stopped.is_set():
            with suppress(OSError, ValueError, Stopped):  # the loader will meet the same, and say so
                self.shards.cache.fetch(url, wait=False, stopped=self.stopped)

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
