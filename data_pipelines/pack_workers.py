"""Write shards in several processes that report every picture and stop at the first failure."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any

from softmoe_clip.data_pipelines.pack_shard import Done, Job, write_shard
from softmoe_clip.data_pipelines.processes import SPAWN, process_pool

PICTURES_WORTH_A_PROCESS = 300  # starting one takes about as long
SECONDS_BETWEEN_LOOKS = 0.2
KILLED = (
    "a process that packs was stopped from outside or could not start, most often for too little memory "
    '(or a script without `if __name__ == "__main__":`): try fewer workers, 1 for none'
)

shared: dict[str, Any] = {}  # of a worker: the counter of pictures and the sign to stop


def write_shards(jobs: Sequence[Job], num_workers: int, advance: Callable[..., None]) -> list[Done]:
    """Write all shards on `num_workers` cores: as processes where there are shards enough, else as threads.

    The bytes don't depend on their number. Raises what a shard raised first, once no worker writes any more.
    """
    num_pictures = sum(len(job.items) for job in jobs)
    num_processes = min(num_workers, len(jobs), -(-num_pictures // PICTURES_WORTH_A_PROCESS))
    if num_processes <= 1:
        return [write_shard(job, num_workers, advance) for job in jobs]
    counter, stop = SPAWN.Value("q", 0), SPAWN.Event()
    num_threads = -(-num_workers // num_processes)
    with process_pool(num_processes, KILLED, remember, (counter, stop)) as pool:
        try:
            futures = [pool.submit(write_here, job, num_threads) for job in jobs]
            follow(futures, counter, advance)
            return [future.result() for future in futures]
        finally:
            stop.set()


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


def remember(counter: Any, stop: Any) -> None:
    """Keep in a worker what it shares with the others."""
    shared.update(counter=counter, stop=stop)


def write_here(job: Job, num_threads: int) -> Done:
    """Write one shard in a worker."""

    def advance(count: int) -> None:
        if shared["stop"].is_set():
            raise InterruptedError("another shard failed")
        with shared["counter"].get_lock():
            shared["counter"].value += count

    return write_shard(job, num_threads, advance)
