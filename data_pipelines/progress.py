"""Show how far long work has come: a bar on a terminal, a plain line now and then anywhere else."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(
    description: str, total: int | None = None, unit: str = "items", already: int = 0
) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, note="")`, which reports to stderr with a rate and the time left.

    `already` counts what an earlier process did, which is shown but not part of the rate. SOFTMOE_CLIP_QUIET=1
    silences.
    """
    if os.environ.get("SOFTMOE_CLIP_QUIET", "0") not in ("", "0"):
        yield lambda count=1, note="": None
    elif sys.stderr.isatty():
        yield from _bar(description, total, unit, already)
    else:
        yield from _lines(description, total, unit, already)


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress inside: for what another process shows."""
    before = os.environ.get("SOFTMOE_CLIP_QUIET", "0")
    os.environ["SOFTMOE_CLIP_QUIET"] = "1"
    try:
        yield
    finally:
        os.environ["SOFTMOE_CLIP_QUIET"] = before


def _bar(description: str, total: int | None, unit: str, already: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=already, rate="", note="")
        start, done = time.monotonic(), 0

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            done += count
            bar.update(task, advance=count, rate=_rate(done, time.monotonic() - start), note=note)

        yield advance


def _lines(description: str, total: int | None, unit: str, already: int) -> Iterator[Callable[..., None]]:
    start = last_line = time.monotonic()
    done = 0

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last_line
        done += count
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            line = _line(description, done, total, unit, now - start, already)
            print(f"{line}, {note}" if note else line, file=sys.stderr, flush=True)

    yield advance
    seconds = time.monotonic() - start
    if last_line > start:
        print(f"{description}: {done} {unit} in {_duration(seconds)}", file=sys.stderr, flush=True)


def _line(description: str, done: int, total: int | None, unit: str, seconds: float, already: int) -> str:
    if total is None:
        return f"{description}: {done} {unit}, {_rate(done, seconds)}"
    left = _duration(seconds / done * max(total - already - done, 0)) if done else "unknown time"
    return f"{description}: {already + done}/{total} {unit}, {_rate(done, seconds)}, {left} left"


def _rate(done: int, seconds: float) -> str:
    rate = done / max(seconds, 1e-6)
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2f}/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
