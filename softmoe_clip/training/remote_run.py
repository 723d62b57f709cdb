"""A run folder at a URL (s3, gs, whatever fsspec writes): training works in a folder here, which is mirrored there.

An object store knows no rename, so that nothing counts by its place alone: a checkpoint there is whole when its
checksums, which are uploaded last, are there and agree. What is here and was uploaded may go; what was not stays.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softmoe_clip.config import TrainConfig
from softmoe_clip.data_pipelines.fetch import fetch
from softmoe_clip.data_pipelines.shard_cache import cache_folder
from softmoe_clip.data_pipelines.shards import is_remote
from softmoe_clip.training.checkpoint import folder_name, kept, step_of
from softmoe_clip.training.checksums import CHECKSUMS, check_checksums
from softmoe_clip.training.run_folder import CHECKPOINT_NAME, checkpoints_in, model_folders, say

TRIES = 4
FIRST_PAUSE = 1.0  # seconds; each one is twice as long


def run_at(config: TrainConfig) -> "Mirror | Here":
    """Return where a run is: in a folder, or at a URL with a folder of this machine to work in."""
    return Mirror(config) if is_remote(config.out) else Here(config)


class Here:
    """A run in a folder, which needs no mirror."""

    def __init__(self, config: TrainConfig):
        self.folder = Path(config.out).expanduser()

    def __str__(self) -> str:
        return str(self.folder)

    def fetch(self) -> None:
        """Do nothing: all of it is here."""

    def upload(self, step: int = 0) -> None:
        """Do nothing: all of it is where it should be."""

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Do nothing after the last line of the logs, too."""
        yield


class Mirror:
    """A run at a URL, and the folder of this machine in which it is trained."""

    def __init__(self, config: TrainConfig):
        self.url = config.out.rstrip("/")
        self.folder = Path(config.working_folder or cached_under(self.url)).expanduser()
        self.keep_last, self.keep_every = config.keep_last, config.keep_every
        self.models = model_folders(config)
        self.system, self.root = file_system(self.url)
        self.note = self.folder.with_name(f"{self.folder.name}.uploaded.json")

    def __str__(self) -> str:
        return self.url

    def fetch(self) -> None:
        """Make the working folder hold the run at the URL, unless it holds it already and is as far or further.

        Raises ValueError where it holds steps of another run that were never uploaded.
        """
        there, here = self.begun_there(), begun_in(self.folder)
        step_here = newest_whole(self.folder / "checkpoints")
        if here is not None and here != there:
            if step_here > self.uploaded()["step"]:
                raise ValueError(
                    f"{self.folder} is after step {step_here} of a run that {self.url} does not hold: "
                    "remove that folder to go on without it"
                )
            shutil.rmtree(self.folder)
            self.note.unlink(missing_ok=True)
            step_here = 0
        steps = self.whole_steps() if there is not None else []
        if here is None or here != there or max(steps, default=0) > step_here:
            for name in [*self.names(), *(f"{model}/{name}" for model in self.models for name in self.names(model))]:
                self.get(name)
            if steps:
                say(f"fetching the newest checkpoint of {self.url} into {self.folder}")
            self.get_newest([step for step in steps if step > step_here])
        elif step_here:
            self.upload(step_here)  # what a failed or killed process left here

    def get_newest(self, steps: list[int]) -> None:
        """Fetch the newest checkpoint that arrives whole; others are named, and left alone."""
        for step in sorted(steps, reverse=True):
            name = folder_name(step)
            part = self.folder / "checkpoints" / f".{name}.{os.getpid()}"
            for file in self.names(f"checkpoints/{name}"):
                self.get(f"checkpoints/{name}/{file}", part / file)
            try:
                check_checksums(part)
                shutil.rmtree(part.with_name(name), ignore_errors=True)  # a damaged one of an earlier time
                part.rename(part.with_name(name))
                self.write_note(step)
                return
            except (ValueError, OSError) as error:
                shutil.rmtree(part)
                say(f"checkpoint {self.url}/checkpoints/{name} is damaged ({error})")

    def upload(self, step: int = 0) -> None:
        """Upload what changed since the last time, then the checkpoint after `step`, and remove what need not be kept.

        Raises OSError, one sentence, where that fails several times; all is still here then, and the next start of the
        run uploads it.
        """
        known = self.uploaded()
        for name, state in states(self.folder).items():
            if known["files"].get(name) != state:
                self.put(self.folder / name, f"{name}.part")
                self.tried(lambda name=name: self.system.mv(self.at(f"{name}.part"), self.at(name)))
                known["files"][name] = state
        if step and step not in self.whole_steps():
            folder = f"checkpoints/{folder_name(step)}"
            files = sorted(path.name for path in (self.folder / folder).iterdir())
            for name in sorted(files, key=CHECKSUMS.__eq__):  # the checksums come last
                self.put(self.folder / folder / name, f"{folder}/{name}")
        if step:
            self.prune(step)
        self.write_note(step or known["step"], known["files"])

    def prune(self, newest: int) -> None:
        """Remove checkpoints at the URL by the rule for those in a folder, the checksums first."""
        whole = self.whole_steps()
        stay = kept((step for step in whole if step <= newest), self.keep_last, self.keep_every)
        for name, step in self.checkpoints().items():
            if step in stay:
                continue
            folder = self.at(f"checkpoints/{name}")
            if step in whole:
                self.tried(lambda folder=folder: self.system.rm_file(f"{folder}/{CHECKSUMS}"))
            self.tried(lambda folder=folder: self.system.rm(folder, recursive=True))

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Upload the last lines of the logs when all else is done, also after a mistake, which then is what is told."""
        try:
            yield
        except OSError:  # a failed upload has been tried often enough
            raise
        except Exception:
            with suppress(OSError):
                self.upload()
            raise
        self.upload()

    def begun_there(self) -> str | None:
        """Return when the run at the URL was begun, which tells runs apart; None where there is none."""
        names = self.names()
        if "versions.json" in names:
            facts = self.tried(lambda: self.system.cat_file(self.at("versions.json")))
            try:
                return json.loads(facts)["begun"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.url}/versions.json is damaged: give another URL as out") from None
        if names:
            raise ValueError(f"{self.url} holds files but no run (no versions.json): give another URL as out")
        return None

    def whole_steps(self) -> list[int]:
        """Return the steps of the checkpoints at the URL whose checksums, and with them all else, were uploaded."""
        return [step for name, step in self.checkpoints().items() if CHECKSUMS in self.names(f"checkpoints/{name}")]

    def checkpoints(self) -> dict[str, int]:
        """Return the checkpoints at the URL, whole or not, with their steps; another name is somebody else's."""
        folders = self.names("checkpoints", kind="directory")
        return {name: step_of(name) for name in folders if CHECKPOINT_NAME.fullmatch(name)}

    def names(self, folder: str = "", kind: str = "file") -> list[str]:
        """List the files, or the folders, of a folder at the URL; one that is not there has none."""

        def look() -> list[dict]:
            self.system.invalidate_cache()
            try:
                return self.system.ls(self.at(folder), detail=True)
            except FileNotFoundError:
                return []

        names = {entry["name"].rstrip("/").rpartition("/")[2] for entry in self.tried(look) if entry["type"] == kind}
        return sorted(name for name in names if not name.endswith(".part"))

    def get(self, name: str, to: Path | None = None) -> None:
        """Fetch one file."""
        to = to or self.folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        fetch(f"{self.url}/{name}", to)

    def put(self, file: Path, name: str) -> None:
        """Upload one file, and look whether all of it has arrived."""
        target, size = self.at(name), file.stat().st_size

        def work() -> None:
            self.system.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.system.put_file(str(file), target)
            self.system.invalidate_cache()
            if (arrived := self.system.info(target)["size"]) < size:  # a log may grow meanwhile
                raise OSError(f"{arrived:,} of {size:,} bytes arrived")

        self.tried(work)

    def at(self, name: str) -> str:
        """Return where the file system has a file of the run."""
        return f"{self.root}/{name}".rstrip("/")

    def tried(self, work: Callable):
        """Do it until it succeeds, with longer and longer pauses between tries."""
        for number in range(TRIES):
            try:
                return work()
            except Exception as error:  # each kind of storage has its own; connections fail in a dozen ways
                reason = " ".join(str(error).split()) or type(error).__name__
            if number < TRIES - 1:
                time.sleep(FIRST_PAUSE * 2**number)
        raise OSError(
            f"{self.url} could not be reached in {TRIES} tries ({reason}): what is not there yet is in {self.folder}; "
            "start the same command again to go on"
        )

    def uploaded(self) -> dict:
        """Return what is known to be at the URL: the newest step, and the state of each file when it was uploaded."""
        try:
            return json.loads(self.note.read_text())
        except (OSError, ValueError):
            return {"step": 0, "files": {}}

    def write_note(self, step: int, files: dict | None = None) -> None:
        """Remember what is at the URL; without `files`, all that is here."""
        part = self.note.with_suffix(".part")
        part.write_text(json.dumps({"step": step, "files": states(self.folder) if files is None else files}))
        part.replace(self.note)


def file_system(url: str) -> tuple:
    """Return fsspec's file system for a URL, and the path that the URL has in it."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"out: {url} cannot be used: {' '.join(str(error).split())}") from None
    return system, path.rstrip("/")


def cached_under(url: str) -> Path:
    """Name the working folder of a URL in this user's cache folder."""
    return cache_folder() / "runs" / f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def begun_in(run: Path) -> str | None:
    """Return when the run in a folder was begun, None where there is none."""
    try:
        return json.loads((run / "versions.json").read_text())["begun"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest_whole(checkpoints: Path) -> int:
    """Return the step of the newest checkpoint in a folder that is not damaged, 0 where there is none."""
    for path, step in sorted(checkpoints_in(checkpoints).items(), reverse=True):
        with suppress(ValueError, OSError):
            check_checksums(path)
            return step
    return 0


def states(run: Path) -> dict[str, list[int]]:
    """Return size and time of all files of a run but checkpoints and what is only half-written."""
    names = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    shown = (n for n in names if n.parts[0] != "checkpoints" and not any(part.startswith(".") for part in n.parts))
    found = {name.as_posix(): (run / name).stat() for name in sorted(shown) if name.suffix not in (".tmp", ".part")}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}
