"""Write shards in several processes that stop with the one that started them."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from softmoe_clip.data_pipelines.pack_shard import Done, Job, write_shard

PICTURES_WORTH_A_PROCESS = 300  # starting one takes about as long
SECONDS_BETWEEN_LOOKS = 0.2

shared: dict[str, Any] = {}  # of a worker: the counter of pictures and the sign to stop


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_shards(jobs: Sequence[Job], num_workers: int, advance: Callable[..., None]) -> list[Done]:
    """Write all shards on `num_workers` cores: as processes where there are shards enough, else as threads.

    The bytes don't depend on their number. Raises what a shard raised first, once no worker writes any more.
    """
    num_pictures = sum(len(job.items) for job in jobs)
    num_processes = min(num_workers, len(jobs), -(-num_pictures // PICTURES_WORTH_A_PROCESS))
    if num_processes <= 1:
        return [write_shard(job, num_workers, advance) for job in jobs]
    context = get_context("spawn")  # a fork copies the held locks of other threads
    counter, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(num_processes, context, start_worker, (counter, stop))
    num_threads = -(-num_workers // num_processes)
    try:
        futures = [pool.submit(write_here, job, num_threads) for job in jobs]
        follow(futures, counter, advance)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that packs was stopped from outside or could not start, most often for too little memory "
            '(or a script without `if __name__ == "__main__":`): try fewer workers, 1 for none'
        ) from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def follow(futures: Sequence[Future], counter: Any, advance: Callable[..., None]) -> None:
    """Report progress until all is done; raise what failed first."""
    pending, seen = set(futures), 0
    while pending:
        done, pending = wait(pending, SECONDS_BETWEEN_LOOKS, FIRST_EXCEPTION)
        if (now := counter.value) > seen:
            advance(now - seen)
            seen = now
        for future in done:
            future.result()


def start_worker(counter: Any, stop: Any) -> None:
    """Make a worker leave Ctrl-C to its parent, and end as soon as that is gone."""
    shared.update(counter=counter, stop=stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_the_parent, daemon=True).start()


def end_with_the_parent() -> None:
    """A worker of a killed process would wait for work for ever."""
    parent_process().join()
    os._exit(1)


def write_here(job: Job, num_threads: int) -> Done:
    """Write one shard in a worker."""

    def advance(count: int) -> None:
        if shared["stop"].is_set():
            raise InterruptedError("another shard failed")
        with shared["counter"].get_lock():
            shared["counter"].value += count

    return write_shard(job, num_threads, advance)
