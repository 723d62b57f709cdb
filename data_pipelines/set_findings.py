"""What is wrong between samples: doubled pictures, captions and keys, samples torn apart, leaks between two sets."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.findings import Finding, finding
from softmoe_clip.data_pipelines.picture_hash import Look, nearest_earlier, nearest_in
from softmoe_clip.data_pipelines.sample_facts import Facts
from softmoe_clip.data_pipelines.tar_walk import TarPart


class Place(NamedTuple):
    """A sample and the earlier one (or the one of another set) that it equals."""

    sample: int
    other: int


def shard_names(urls: Sequence[str]) -> list[str]:
    """Return the file names of shards, and whole paths where two have the same name."""
    names = [url.rsplit("/", 1)[-1] for url in urls]
    count = Counter(names)
    return [name if count[name] == 1 else url for name, url in zip(names, urls, strict=True)]


def place(facts: Facts, names: Sequence[str], sample: int) -> str:
    """Say where a sample lies."""
    return f"{facts.keys[sample]} in {names[facts.shards[sample]]}"


def duplicate_keys(parts: Sequence[TarPart], names: Sequence[str]) -> Iterator[Finding]:
    """Find keys that come twice in one tar: other readers stop there, or put two samples together."""
    for part, name in zip(parts, names, strict=True):
        for key, count in Counter(part.keys).items():
            if count > 1:
                yield finding("duplicate key", name, key, f"the key comes {count} times; webdataset stops here")


def read_otherwise(parts: Sequence[TarPart], names: Sequence[str]) -> Iterator[Finding]:
    """Find tars of which readers from first byte to last, webdataset and open_clip, make other samples than we do."""
    for part, name in zip(parts, names, strict=True):
        torn, dotted = interleaved(part), [key for key in part.keys if "." in key.rsplit("/", 1)[-1]]
        for keys, what, there in ((torn, "not side by side", "torn apart"), (dotted, "with dots in the key", "joined")):
            if keys:
                some = f"{len(keys):,} of its {len(part.keys):,} samples lie there {what} (first: {keys[0]})"
                reason = f"{some}: {there} by webdataset, not by softmoe-clip's own loader; --fix writes them anew"
                yield finding("read otherwise", name, "", reason)


def interleaved(part: TarPart) -> list[str]:
    """List the keys whose members have some of another key between them."""
    owners = np.repeat(np.arange(len(part.keys)), np.diff(part.starts))[np.argsort(part.offsets)]
    begins = owners[np.flatnonzero(np.diff(owners, prepend=-1))]  # a sample for each run of members
    samples, num_runs = np.unique(begins, return_counts=True)
    return [part.keys[sample] for sample in samples[num_runs > 1]]


def keys_across_shards(facts: Facts, parts: Sequence[TarPart], names: Sequence[str]) -> Iterator[Finding]:
    """Find samples torn apart at the end of a shard, and shards that number their samples as earlier ones do."""
    first_shard: dict[str, int] = {}
    repeated: dict[int, list[tuple[str, int]]] = defaultdict(list)
    torn = {
        (int(facts.shards[trouble.sample]), facts.keys[trouble.sample])
        for trouble in facts.troubles
        if trouble.kind in ("no picture", "bad caption")
    }
    for shard, part in enumerate(parts):
        for key in dict.fromkeys(part.keys):
            earlier = first_shard.setdefault(key, shard)
            if earlier == shard:
                continue
            if {(earlier, key), (shard, key)} <= torn:
                reason = f"its members lie in {names[earlier]} and here: neither part is a whole sample"
                yield finding("split key", names[shard], key, reason, f"{key} in {names[earlier]}")
            else:
                repeated[shard].append((key, earlier))
    for shard, keys in repeated.items():
        key, earlier = keys[0]
        some = f"{len(keys):,} of its {len(parts[shard].keys):,} keys come in earlier shards, too"
        yield finding("repeated keys", names[shard], "", f"{some} (first: {key} in {names[earlier]})")


def same_pictures(facts: Facts) -> list[Place]:
    """Pair each picture that an earlier sample has, byte for byte, with the first such sample."""
    with_picture = facts.digests.any(1).nonzero()[0]
    _, first, group = np.unique(facts.digests[with_picture].view("V16").ravel(), return_index=True, return_inverse=True)
    earliest = with_picture[first[group.ravel()]]
    return [
        Place(int(sample), int(other)) for sample, other in zip(with_picture, earliest, strict=True) if other < sample
    ]


def near_pictures(facts: Facts, same: Sequence[Place]) -> list[tuple[int, int, int]]:
    """Pair each picture that nearly looks like an earlier one with the closest, and the bits that differ."""
    return nearest_earlier(without(facts.look, [double.sample for double in same]))


def without(look: Look, samples: Sequence[int]) -> Look:
    """Leave samples out of a search."""
    has_shapes = look.has_shapes.copy()
    has_shapes[list(samples)] = False
    return look._replace(has_shapes=has_shapes)


def same_captions(facts: Facts) -> Iterator[tuple[np.ndarray, int]]:
    """Yield, for each caption of several samples, those samples in order, and which digest it is."""
    order = np.argsort(facts.captions, kind="stable")
    captions, owners = facts.captions[order], facts.owners[order]
    bounds = [0, *(np.flatnonzero(captions[1:] != captions[:-1]) + 1).tolist(), len(captions)]
    groups = [(owners[a:b], int(captions[a])) for a, b in pairwise(bounds) if b - a > 1]
    yield from sorted(groups, key=lambda group: (int(group[0][0]), group[1]))


def doubles(facts: Facts, names: Sequence[str], same: Sequence[Place]) -> Iterator[Finding]:
    """Find doubled and nearly doubled pictures."""
    for double in same:
        other = place(facts, names, double.other)
        name = names[facts.shards[double.sample]]
        kind, reason = "same picture", f"the same bytes as {other}"
        own, earlier = (facts.labels[sample] for sample in double)
        if own not in (None, earlier):
            there = "none" if earlier is None else earlier
            kind, reason = "other label", f"{reason}, but the label is {own} here and {there} there: correct one"
        yield finding(kind, name, facts.keys[double.sample], reason, other)
    for sample, earlier, bits in near_pictures(facts, same):
        other = place(facts, names, earlier)
        reason = f"looks like {other} ({bits} of 256 bits differ)"
        yield finding("near picture", names[facts.shards[sample]], facts.keys[sample], reason, other)


def leaks(facts: Facts, names: Sequence[str], against: Facts, other_names: Sequence[str]) -> dict[int, Finding]:
    """Find, by sample, the pictures and pairs that another set has, too."""
    found: dict[int, Finding] = {}

    def add(sample: int, kind: str, reason: str, other: str) -> None:
        if sample not in found:
            found[sample] = finding(kind, names[facts.shards[sample]], facts.keys[sample], reason, other)

    theirs = {digest.tobytes(): i for i, digest in reversed(list(enumerate(against.digests))) if digest.any()}
    for sample, digest in enumerate(facts.digests):
        if (i := theirs.get(digest.tobytes())) is not None:
            other = place(against, other_names, i)
            add(sample, "leaked picture", f"the same bytes as {other}", other)
    for sample, i, bits in nearest_in(against.look, without(facts.look, list(found))):
        other = place(against, other_names, i)
        add(sample, "leaked picture", f"looks like {other} ({bits} of 256 bits differ)", other)
    # Keys are numbers most often, and a caption made of a class comes many times: together they would meet by chance.
    shared = np.isin(facts.pairs, against.pairs[of_one_sample(against)]) & of_one_sample(facts)
    first_owner = dict(zip(against.pairs[::-1].tolist(), against.owners[::-1].tolist(), strict=True))
    for sample, pair in zip(facts.owners[shared].tolist(), facts.pairs[shared].tolist(), strict=True):
        other = place(against, other_names, first_owner[pair])
        add(sample, "leaked pair", f"the same key and caption as {other}", other)
    return dict(sorted(found.items()))


def of_one_sample(facts: Facts) -> np.ndarray:
    """Tell of each caption (c,) whether no other sample has it."""
    _, places, counts = np.unique(facts.captions, return_inverse=True, return_counts=True)
    return counts[places] == 1


def only_labels(facts: Facts, names: Sequence[str]) -> Iterator[Finding]:
    """Find out whether samples have a label and no caption: good for evaluation, bad for training."""
    rest = np.setdiff1d(np.arange(len(facts.keys)), [*facts.owners, *(trouble.sample for trouble in facts.troubles)])
    if len(rest):
        reason = f"{len(rest):,} samples have a label and no caption, this is the first: training can't use them"
        yield finding("only a label", names[facts.shards[rest[0]]], facts.keys[rest[0]], reason)
