"""Turn what a user types (a folder, a brace pattern, several of them) into a list of shards with sample counts."""

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from softmoe_clip.data_pipelines.fetch import Missing, read_url

READERS = 16  # of small files at once


@dataclass(frozen=True)
class Shard:
    """One tar, here or at a URL, and how many samples it holds where a file beside it says so."""

    url: str
    num_samples: int | None


def is_remote(url: str) -> bool:
    """Tell a URL from a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", url) is not None


def find_shards(pattern: str | Sequence[str]) -> list[Shard]:
    """List the shards of a folder, a brace or `*` pattern, several joined by `::`, or a list (not split at `::`).

    Any of them may be a URL. The order is the pattern's; the shards of a folder or a `*` are sorted by name. Raises
    ValueError where nothing, or not all of it, is there; of URLs only the listing is looked at.
    """
    parts = pattern.split("::") if isinstance(pattern, str) else [str(part) for part in pattern]
    if not any(part.strip() for part in parts):
        raise ValueError(f"no shards: the pattern {pattern!r} is empty")
    found = [url for part in parts if part.strip() for url in _expand(part.strip())]
    remote, local = _remote_counts([url for url in found if is_remote(url)]), cache(_counts)
    return [
        Shard(url, remote.get(url) if is_remote(url) else local(Path(url).parent).get(Path(url).name)) for url in found
    ]


def _expand(part: str) -> list[str]:
    if part.startswith("pipe:"):
        raise ValueError(f"{part} can only be streamed, in training (data.train); here shards are files or URLs")
    return _expand_remote(part) if is_remote(part) else [str(path) for path in _expand_local(part)]


def _expand_remote(part: str) -> list[str]:
    urls = braces(part)
    return [inner for url in urls for inner in ([url] if re.search(r"\.tar($|\?)", url) else _listed(url))]


def _listed(url: str) -> list[str]:
    """List the shards of a remote folder or `*` pattern, where its kind of storage can be listed."""
    pattern = url if "*" in url else f"{url.rstrip('/')}/*.tar"
    if url.startswith(("http://", "https://")):
        name_them = f"{url.rstrip('/').partition('*')[0].rpartition('/')[0] if '*' in url else url.rstrip('/')}"
        raise ValueError(f"{url} cannot be listed: name its shards, as in {name_them}/{{00000..00099}}.tar")
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        names = sorted(system.unstrip_protocol(name) for name in system.glob(path) if name.endswith(".tar"))
    except ImportError as error:
        raise ValueError(f"{url} needs a package that is not installed: {' '.join(str(error).split())}") from None
    except Exception as error:  # each kind of storage has its own
        raise ValueError(f"{url} cannot be listed: {' '.join(str(error).split())}") from None
    if not names:
        raise ValueError(f"no shards (*.tar) in {url}: check the address")
    return names


def _remote_counts(urls: list[str]) -> dict[str, int]:
    """Read the files of counts beside remote shards: `sizes.json`, else each shard's own, several at once."""
    counts: dict[str, int] = {}
    folders = dict.fromkeys(url.rpartition("/")[0] for url in urls)
    with ThreadPoolExecutor(READERS) as readers:
        for folder, sizes in zip(folders, readers.map(lambda f: _read_remote(f"{f}/sizes.json"), folders), strict=True):
            counts |= {f"{folder}/{name}": count for name, count in sizes.items()}
        left = [url for url in urls if url not in counts and url.endswith(".tar")]
        # Where the first has no such file, the others are not asked for: they may be thousands.
        if left and (first := _read_remote(_stats_of(left[0]))):
            rest = readers.map(lambda url: _read_remote(_stats_of(url)), left[1:])
            counts |= {url: stats.get("successes") for url, stats in zip(left, [first, *rest], strict=True)}
    return {url: count for url, count in counts.items() if isinstance(count, int)}


def _stats_of(url: str) -> str:
    return f"{url.removesuffix('.tar')}_stats.json"


def _read_remote(url: str) -> dict:
    try:
        written = read_url(url)
        # Some servers answer with a page where there is no such file.
        content = {} if written.lstrip().startswith(b"<") else json.loads(written)
    except Missing:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{url} is damaged ({error}): delete it, the samples are then counted from the tars") from None
    return content if isinstance(content, dict) else {}


def braces(part: str) -> list[str]:
    """Spell out a brace pattern."""
    import braceexpand

    try:
        return list(braceexpand.braceexpand(part))
    except ValueError as error:
        raise ValueError(f"the shard pattern {part} has a wrong brace: {error}") from error


def _expand_local(part: str) -> list[Path]:
    folder = Path(part).expanduser()
    if folder.is_dir():
        return _folder(folder)
    expanded = [part] if Path(part).exists() else braces(part)
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
