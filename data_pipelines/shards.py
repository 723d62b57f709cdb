"""Turn what a user types (a folder, a brace pattern, several of them) into a list of shards with sample counts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Shard:
    """One tar, and how many samples it holds where a file beside it says so."""

    url: str
    num_samples: int | None


def find_shards(pattern: str | Sequence[str]) -> list[Shard]:
    """List the shards of a folder, a brace or `*` pattern, several joined by `::`, or a list (not split at `::`).

    The order is the pattern's; the shards of a folder or a `*` are sorted by name. Raises ValueError where nothing, or
    not all of it, is there.
    """
    parts = pattern.split("::") if isinstance(pattern, str) else [str(part) for part in pattern]
    if not any(part.strip() for part in parts):
        raise ValueError(f"no shards: the pattern {pattern!r} is empty")
    paths = [path for part in parts if part.strip() for path in _expand(part.strip())]
    count = cache(_counts)
    return [Shard(str(path), count(path.parent).get(path.name)) for path in paths]


def _expand(part: str) -> list[Path]:
    if re.match(r"(pipe:|[a-z0-9+.-]+://)", part):
        raise ValueError(f"{part} is not on this machine: copy the shards to a local folder first")
    folder = Path(part).expanduser()
    if folder.is_dir():
        return _folder(folder)
    import braceexpand

    try:
        expanded = [part] if Path(part).exists() else list(braceexpand.braceexpand(part))
    except ValueError as error:
        raise ValueError(f"the shard pattern {part} has a wrong brace: {error}") from error
    paths = [path for name in expanded for path in _glob(Path(name).expanduser())]
    missing = [path for path in paths if not path.exists()]
    if missing or not paths:
        some = f"{len(missing)} of the {len(paths)} shards of {part} are" if len(paths) > 1 else f"the shard {part} is"
        first = f" (first: {missing[0]})" if len(paths) > 1 and missing else ""
        raise ValueError(f"{some} not there{first}: check the path")
    return [inner for path in paths for inner in (_folder(path) if path.is_dir() else [path])]


def _glob(path: Path) -> list[Path]:
    if not re.search(r"[*?\[]", path.name) or path.exists():
        return [path]
    return sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []


def _folder(folder: Path) -> list[Path]:
    shards = sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not shards:
        inner = sorted(str(path) for path in folder.iterdir() if path.is_dir() and any(path.glob("*.tar")))
        what_to_do = (
            f"name one of its folders: {', '.join(inner[:5])}" if inner else "make some with `softmoe-clip pack`"
        )
        raise ValueError(f"no shards (*.tar) in {folder}: {what_to_do}")
    return shards


def _counts(folder: Path) -> dict[str, int]:
    """Read img2dataset's NNNNN_stats.json and open_clip's sizes.json; the latter wins."""
    counts = {}
    for stats in folder.glob("*_stats.json"):
        successes = _read(stats).get("successes")
        counts[f"{stats.name.removesuffix('_stats.json')}.tar"] = successes
    if (sizes := folder / "sizes.json").exists():
        counts.update(_read(sizes))
    return {name: count for name, count in counts.items() if isinstance(count, int)}


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): delete it, the samples are then counted from the tars"
        ) from error
    return content if isinstance(content, dict) else {}
