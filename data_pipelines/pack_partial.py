"""Keep what an interrupted pack has finished, for the same command to continue with."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from softmoe_clip.data_pipelines.full_disk import MORE_SPACE, raise_if_full
from softmoe_clip.data_pipelines.new_folder import lock_folder, refuse_existing, sync
from softmoe_clip.data_pipelines.shard_files import write_synced
from softmoe_clip.data_pipelines.sources import SourceItem

SOURCE, NUM_ITEMS = "source", "number of pictures"  # the two arguments that no one typed


class Partial(NamedTuple):
    """OUT.partial: the growing output, and a note for each shard in it that is whole."""

    root: Path

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def finished(self) -> Path:
        return self.root / "finished"

    @property
    def arguments(self) -> Path:
        return self.root / "arguments.json"

    def num_finished(self) -> int:
        """Count the shards that are whole."""
        return len(list(self.finished.glob("*.json")))


class NothingToPack(ValueError):
    """Not one picture of a split can be used."""


@contextmanager
def partial_folder(out: str | Path, arguments: dict[str, Any]) -> Iterator[Partial]:
    """Yield OUT.partial, with what an earlier process finished there; at the end its shards become OUT, at once.

    On an error it stays if any shard is whole. Raises ValueError for a non-empty OUT, and for whole shards that were
    packed with other ARGUMENTS; OSError with one sentence for a full disk.
    """
    out = Path(out).absolute()
    refuse_existing(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Partial(out.parent / f"{out.name}.partial")
    partial.root.mkdir(exist_ok=True)
    lock = lock_folder(partial.root, out)
    try:
        continue_or_clear(partial, arguments)
        try:
            yield partial
            sync(partial.shards)
            refuse_existing(out)
            os.rename(partial.shards, out)
            sync(out.parent)
        except BaseException as error:
            keep_or_remove(partial, out, error)
            raise
        shutil.rmtree(partial.root, ignore_errors=True)
    finally:
        os.close(lock)


def continue_or_clear(partial: Partial, arguments: dict[str, Any]) -> None:
    """Leave what can be continued with, refuse what was packed otherwise, and clear all else."""
    arguments = json.loads(json.dumps(arguments))
    if partial.num_finished():
        then = read_arguments(partial)
        if then == arguments:
            print(f"continuing with the {partial.num_finished()} finished shards in {partial.root}", file=sys.stderr)
            for file in partial.root.rglob("*.part"):
                file.unlink()
            return
        raise ValueError(
            f"{partial.root} holds an unfinished pack {difference(then, arguments)}: give the same source and options "
            "to continue it, or remove that folder to start anew"
        )
    foreign = [
        path.name for path in partial.root.iterdir() if path.name not in ("shards", "finished", "arguments.json")
    ]
    if foreign:
        raise ValueError(f"{partial.root} holds something else ({min(foreign)}): remove it or choose another folder")
    for folder in (partial.shards, partial.finished):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    write_synced(partial.arguments, json.dumps(arguments, indent=1, ensure_ascii=False) + "\n")
    sync(partial.root)


def read_arguments(partial: Partial) -> dict[str, Any]:
    try:
        return json.loads(partial.arguments.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Say in a few words what is not as it was."""
    typed = [name for name in now if name != SOURCE and then.get(name) != now[name]]
    if typed:
        return "with " + ", ".join(f"{name} {then.get(name)!r}, now {now[name]!r}" for name in typed)
    return "of these pictures, but files, times or captions of some have changed since"


def keep_or_remove(partial: Partial, out: Path, error: BaseException) -> None:
    """Remove what is of no use; tell what stays. A full disk becomes one sentence."""
    count = 0 if isinstance(error, NothingToPack) else partial.num_finished()
    if not count:
        shutil.rmtree(partial.root, ignore_errors=True)
    stays = f"{count} finished shards stay in {partial.root}, free some space and give the same command to continue"
    raise_if_full(error, out, stays if count else f"nothing was kept, {MORE_SPACE}")
    if count:
        print(
            f"stopped: {count} finished shards stay in {partial.root}; the same command continues, "
            "removing that folder starts anew",
            file=sys.stderr,
        )


def fingerprint(items: Iterable[SourceItem]) -> str:
    """Hash all that is known of the pictures without reading them: names, captions, sizes and times of the files."""
    digest = hashlib.sha256()
    for item in items:
        try:
            state = os.stat(item.path)
            file = [state.st_size, state.st_mtime_ns]
        except OSError:
            file = []
        about = [item.name, str(item.path), item.captions, item.split, item.extra, item.problem, item.label, file]
        where = list(item.read) if isinstance(item.read, tuple) else []
        digest.update(json.dumps([*about, where], default=str).encode())
    return digest.hexdigest()
