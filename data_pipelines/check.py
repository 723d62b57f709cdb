"""Read every sample of a shard set once and list what is wrong with it, before a long run finds out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.samples import BadSample, read_pair
from softmoe_clip.data_pipelines.shards import find_shards
from softmoe_clip.data_pipelines.tar_index import ShardSet


class Finding(TypedDict):
    """One thing that is wrong: an error costs samples, a warning does not. The key is empty for a whole shard."""

    severity: Literal["error", "warning"]
    shard: str
    key: str
    reason: str


class ShardCount(NamedTuple):
    """How many samples of a shard can be used."""

    shard: str
    num_samples: int
    num_good: int


@dataclass(frozen=True)
class CheckReport:
    """What `check` found, and the number of samples it read."""

    num_samples: int
    findings: list[Finding] = field(default_factory=list)
    counts: list[ShardCount] = field(default_factory=list)


def check(pattern: str | Sequence[str]) -> CheckReport:
    """Read, pair and decode every sample of the shards (see `find_shards`). Raises ValueError where there are none."""
    shards = ShardSet.open(pattern)
    report = CheckReport(len(shards), list(_shard_findings(pattern, shards)))
    with progress("checking", len(shards), "samples") as advance:
        first = 0
        for url, count in zip(shards.urls, shards.counts, strict=True):
            num_good = 0
            for index in range(first, first + count):
                reason = _what_is_wrong(shards, index)
                if reason is None:
                    num_good += 1
                else:
                    report.findings.append(
                        Finding(severity="error", shard=Path(url).name, key=shards.keys[index], reason=reason)
                    )
                advance()
            report.counts.append(ShardCount(Path(url).name, count, num_good))
            first += count
    return report


def _shard_findings(pattern: str | Sequence[str], shards: ShardSet) -> Iterator[Finding]:
    for problem in shards.problems:
        name, _, reason = problem.partition(": ")
        yield Finding(severity="error", shard=name, key="", reason=reason)
    for shard, count in zip(find_shards(pattern), shards.counts, strict=True):
        name = Path(shard.url).name
        if shard.num_samples not in (None, count):
            reason = f"holds {count} samples, the file beside it says {shard.num_samples}"
            yield Finding(severity="error", shard=name, key="", reason=reason)
        if count == 0:
            yield Finding(severity="warning", shard=name, key="", reason="holds no samples")
    for part in shards.parts:  # across tars, keys often begin anew
        for key, count in Counter(part.keys).items():
            if count > 1:
                reason = f"the key occurs {count} times; other readers may stop here"
                yield Finding(severity="warning", shard=part.name, key=key, reason=reason)


def _what_is_wrong(shards: ShardSet, index: int) -> str | None:
    try:
        pair = read_pair(shards.read(index))
        decode_rgb(pair.image, min_side=8)
    except BadSample as bad:
        return bad.reason
    except ValueError as error:
        return str(error)
    return None
