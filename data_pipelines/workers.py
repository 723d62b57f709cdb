"""Compute the items of a sequence in order, in worker processes that live as long as the iteration."""

import atexit
import signal
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from typing import Any, Protocol, Self
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader

END = object()
UNFINISHED: WeakSet[Iterator[Any]] = WeakSet()


@atexit.register
def close_unfinished() -> None:
    """End the workers before Python does, which asks with the SIGTERM that they ignore, and would wait for ever."""
    for results in list(UNFINISHED):
        results.close()


class Items(Protocol):
    """Something whose items can be computed in any process; all of it that a worker needs can be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Any: ...


class Beside(Protocol):
    """Something that works in this process beside the iteration, and is called with the number of each item."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error) -> None: ...

    def __call__(self, number: int) -> None: ...


class Guarded:
    """Hands a user's mistake over as a value: raised in a worker, torch would wrap it into a page of traceback."""

    def __init__(self, items: Items):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.items[number]
        except (ValueError, OSError) as error:
            return error


def computed_in_order(
    items: Items, num_workers: int, pin_memory: bool = False, beside: Beside | None = None
) -> Iterator[Any]:
    """Yield items[0], items[1], ... with `num_workers` processes computing ahead; 0 computes in this one.

    `pin_memory` puts tensors where a GPU can fetch them, if there is one (and turns tuples in lists into lists).
    `beside` is entered once the workers run, which were forked before it started any thread.
    Draws nothing from torch's global generator. Raises what an item raised, or ValueError when a worker died.
    """
    results = ordered_results(items, num_workers, pin_memory and torch.cuda.is_available(), beside)
    UNFINISHED.add(results)
    return results


def ordered_results(items: Items, num_workers: int, pin_memory: bool, beside: Beside | None) -> Iterator[Any]:
    """Do it: wait for one result after the other, and end the workers whatever happens."""
    iterator = start(items, num_workers, pin_memory)
    try:
        with beside or nullcontext():
            for number in count():
                if beside is not None:
                    beside(number)
                if (item := next_result(iterator, num_workers)) is END:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
    finally:
        if num_workers:
            iterator._shutdown_workers()  # a traceback may hold the iterator, and so its workers, to the very end


def next_result(iterator: Iterator[Any], num_workers: int) -> Any:
    """Take the next result, END after the last."""
    try:
        return next(iterator, END)
    except RuntimeError as error:
        if num_workers == 0:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"a loader worker stopped ({reason}): this is most often too little memory or shared memory; "
            "try fewer workers (data.num_workers in training, --workers elsewhere), 0 for none"
        ) from error


def start(items: Items, num_workers: int, pin_memory: bool) -> Iterator[Any]:
    """Start the workers; forked ones use no thread pool, GPU or lock of this process, only files and pixels."""
    with warnings.catch_warnings():
        # Python 3.12 and later warn at every fork of a process with threads; torch warns about more workers than cores.
        warnings.simplefilter("ignore")
        loader = DataLoader(
            Guarded(items),
            batch_size=None,  # an item is a batch already
            num_workers=num_workers,
            collate_fn=unchanged,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # else the loader draws its base seed from the global one
        )
        return iter(loader)


def unchanged(item: Any) -> Any:
    """Keep an item as it is (torch would turn its lists into tensors)."""
    return item


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM: they reach the whole group, while the parent still finishes its step and a checkpoint.

    A worker ends when its parent says so, or within seconds after its parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
