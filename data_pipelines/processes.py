"""Run functions in a pool of processes that end with the one that started them."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any

SPAWN = get_context("spawn")  # a fork copies the held locks of other threads
AHEAD = 4  # tasks that wait for each process


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def process_pool(
    num_processes: int, killed: str, initializer: Callable[..., None] | None = None, arguments: tuple = ()
) -> Iterator[ProcessPoolExecutor]:
    """Open a pool, each process of which calls `initializer(*arguments)` first; tasks that wait at the end are dropped.

    Raises ValueError with the sentence `killed` where a process was killed or could not start.
    """
    pool = ProcessPoolExecutor(num_processes, SPAWN, begin, (initializer, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ValueError(killed) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(function: Callable[[Any], Any], tasks: Iterable[Any], num_processes: int) -> Iterator[Any]:
    """Yield function(task) for each task in order, from processes that read shards; 1 computes here."""
    if num_processes == 1:
        yield from map(function, tasks)
        return
    killed = "a process that read shards was killed: this is most often too little memory; try --jobs 1"
    with process_pool(num_processes, killed) as pool:
        waiting: deque = deque()
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= AHEAD * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def begin(initializer: Callable[..., None] | None, arguments: tuple) -> None:
    """Leave Ctrl-C to the parent, and end when it is gone, even killed: a pool's processes would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)
