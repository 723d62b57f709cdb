"""Read every sample of a shard set once and list what is wrong with it, before a long run finds out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines import set_findings
from softmoe_clip.data_pipelines.findings import ERRORS, Finding, finding
from softmoe_clip.data_pipelines.processes import usable_cores
from softmoe_clip.data_pipelines.sample_facts import Facts, digest, plain, read_facts
from softmoe_clip.data_pipelines.samples import read_pair
from softmoe_clip.data_pipelines.shards import Shard, find_shards
from softmoe_clip.data_pipelines.tar_index import RawSample
from softmoe_clip.data_pipelines.tar_samples import index_shards, raw_samples, shard_slice
from softmoe_clip.data_pipelines.tar_walk import TarPart


class ShardCount(NamedTuple):
    """How many samples of a shard can be used."""

    shard: str
    num_samples: int
    num_good: int


@dataclass(frozen=True)
class Contents:
    """A shard set that was read: its whole tars, their indices, and the facts of their samples."""

    urls: list[str]
    names: list[str]
    parts: list[TarPart]
    facts: Facts

    @cached_property
    def firsts(self) -> list[int]:
        """The number of each shard's first sample."""
        return np.cumsum([0, *(len(part.keys) for part in self.parts)]).tolist()

    def read(self, sample: int) -> RawSample:
        """Read the members of one sample once more."""
        shard = int(self.facts.shards[sample])
        index = sample - self.firsts[shard]
        return next(raw_samples(self.urls[shard], shard_slice(self.parts[shard], index, index + 1)))


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; `contents` is what it read, and `dropped` says why samples by number are not to be kept."""

    num_samples: int
    contents: Contents
    findings: list[Finding] = field(default_factory=list)
    counts: list[ShardCount] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    doubles: dict[int, int] = field(default_factory=dict)

    @property
    def num_errors(self) -> int:
        return sum(found["kind"] in ERRORS for found in self.findings)

    def summary(self) -> dict:
        """Return the counts, ready for JSON."""
        return {
            "num_shards": len(self.counts),
            "num_samples": self.num_samples,
            "num_good": sum(count.num_good for count in self.counts),
            "num_errors": self.num_errors,
            "num_warnings": len(self.findings) - self.num_errors,
            "shards": [count._asdict() for count in self.counts],
        }


def check(
    pattern: str | Sequence[str],
    against: str | Sequence[str] | None = None,
    num_processes: int = 1,
    num_workers: int = 0,
    jobs: int | None = None,
) -> CheckReport:
    """Read, pair and decode every sample of the shards (see `find_shards`), and compare them with each other.

    AGAINST names shards that must not share pictures or pairs with these. `num_processes`, each with `num_workers`
    loader workers, are to train on the shards. `jobs` processes read (default: one per core); the report is the same
    for any number of them. Raises ValueError where there are no shards.
    """
    if num_processes < 1 or num_workers < 0 or (jobs is not None and jobs < 1):
        raise ValueError(f"processes {num_processes}, workers {num_workers} and jobs {jobs}: give 1, 0 and 1 or more")
    jobs = jobs or usable_cores()
    shards = find_shards(pattern)
    other_shards = find_shards(against) if against is not None else []
    findings: list[Finding] = []
    contents = read_contents(shards, jobs, findings)
    dropped = {trouble.sample: trouble.reason for trouble in contents.facts.troubles}
    doubles = [double for double in set_findings.same_pictures(contents.facts) if double.sample not in dropped]
    findings += wrong_counts(shards, contents)
    findings += within(contents, doubles)
    if other_shards:
        other = read_contents(other_shards, jobs, [], "reading the other set")
        leaks = set_findings.leaks(contents.facts, contents.names, other.facts, other.names)
        findings += leaks.values()
        pictures = {sample: leak["reason"] for sample, leak in leaks.items() if leak["kind"] == "leaked picture"}
        dropped = pictures | dropped
    findings += too_few(len(contents.urls), num_processes, num_workers)
    joins = {double.sample: double.other for double in doubles}
    return CheckReport(len(contents.facts.keys), contents, findings, counts(contents), dropped, joins)


def within(contents: Contents, doubles: list[set_findings.Place]) -> Iterator[Finding]:
    """Find what is wrong with the samples of one set, each for itself and beside each other."""
    facts, names = contents.facts, contents.names
    yield from set_findings.duplicate_keys(contents.parts, names)
    yield from set_findings.read_otherwise(contents.parts, names)
    for sample, kind, reason in facts.troubles:
        yield finding(kind, names[facts.shards[sample]], facts.keys[sample], reason)
    yield from set_findings.keys_across_shards(facts, contents.parts, names)
    yield from set_findings.only_labels(facts, names)
    yield from set_findings.doubles(facts, names, doubles)
    yield from doubled_captions(contents)


def read_contents(
    shards: Sequence[Shard], jobs: int, findings: list[Finding], description: str = "checking"
) -> Contents:
    """Read a whole set; what is wrong with tars as such is added to `findings`."""
    urls = [shard.url for shard in shards]
    names = set_findings.shard_names(urls)
    whole = []
    for url, name, part in zip(urls, names, index_shards(urls, jobs), strict=True):
        if isinstance(part, str):
            findings.append(finding("broken tar", name, "", part))
            continue
        for problem in part.problems:
            findings.append(finding("broken tar", name, "", problem.removeprefix(f"{part.name}: ")))
        if not part.keys and not part.problems:
            findings.append(finding("empty shard", name, "", "holds no samples"))
        whole.append((url, name, part))
    urls, names, parts = ([entry[column] for entry in whole] for column in range(3))
    return Contents(urls, names, parts, read_facts(urls, parts, jobs, description))


def wrong_counts(shards: Sequence[Shard], contents: Contents) -> Iterator[Finding]:
    """Compare the number of samples with what the file beside a shard says, and its list of shards with the folder."""
    said = {shard.url: shard.num_samples for shard in shards}
    for url, name, part in zip(contents.urls, contents.names, contents.parts, strict=True):
        if said[url] not in (None, len(part.keys)):
            reason = f"holds {len(part.keys)} samples, the file beside it says {said[url]}"
            yield finding("wrong count", name, "", reason)
    for sizes in dict.fromkeys(Path(shard.url).parent / "sizes.json" for shard in shards):
        listed = json.loads(sizes.read_text("utf-8")) if sizes.is_file() else {}
        for name in sorted(listed) if isinstance(listed, dict) else ():
            if not (sizes.parent / name).exists():
                yield finding("wrong count", name, "", f"is in {sizes}, but not there")


def doubled_captions(contents: Contents) -> Iterator[Finding]:
    """Find captions of several samples; the text is read again from the first of them."""
    facts, names = contents.facts, contents.names
    for owners, caption in set_findings.same_captions(facts):
        first, second = owners[:2].tolist()
        text = next(text for text in read_pair(contents.read(first)).captions if digest(plain(text)) == caption)
        other = set_findings.place(facts, names, second)
        reason = f"{text[:80]!r} is a caption of {len(owners):,} samples (next: {other})"
        yield finding("same caption", names[facts.shards[first]], facts.keys[first], reason, other)


def counts(contents: Contents) -> list[ShardCount]:
    """Count the good samples of each shard."""
    bad = {trouble.sample for trouble in contents.facts.troubles}
    return [
        ShardCount(name, last - first, sum(sample not in bad for sample in range(first, last)))
        for name, (first, last) in zip(contents.names, pairwise(contents.firsts), strict=True)
    ]


def too_few(num_shards: int, num_processes: int, num_workers: int) -> Iterator[Finding]:
    """Warn where readers of whole shards (webdataset, open_clip) would leave some process or worker without any."""
    needed = num_processes * max(num_workers, 1)
    if num_shards < needed:
        reason = (
            f"{num_shards} shards for {num_processes} processes with {num_workers} workers each: webdataset and "
            f"open_clip need {needed} or more. softmoe-clip's own loader divides samples, not shards"
        )
        yield finding("few shards", "", "", reason)
