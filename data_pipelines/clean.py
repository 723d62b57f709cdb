"""Write a checked shard set anew, without what is wrong with it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from softmoe_clip.data_pipelines.check import CheckReport
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.sample_facts import plain
from softmoe_clip.data_pipelines.samples import Pair, captions_of, json_fields, picture_extension, read_pair
from softmoe_clip.data_pipelines.shard_files import members_of, write_lines
from softmoe_clip.data_pipelines.shard_writer import ShardWriter
from softmoe_clip.data_pipelines.tar_index import RawSample
from softmoe_clip.data_pipelines.tar_samples import raw_samples

PLAIN = {"jpeg": "jpg"}  # what open_clip and img2dataset call it


class Cleaned(NamedTuple):
    """How many samples were written, how many left out, and how many doubles gave their captions to another."""

    num_written: int
    num_dropped: int
    num_joined: int


def write_clean(report: CheckReport, out: str | Path, shard_size: int = 1000) -> Cleaned:
    """Write the samples without errors and leaks to OUT, with new keys and counts; skipped.jsonl names the others.

    Of pictures that are the same byte for byte, with no other label, the first stays, and takes over the captions of
    its doubles. Nearly doubled pictures stay. Raises ValueError where nothing is left, or OUT is not empty.
    """
    contents = report.contents
    if not len(contents.facts.keys) > len(report.dropped):
        raise ValueError(f"no sample is good, so there is nothing to write to {out}: pack the pictures again")
    joins = doubles_to_join(report)
    keys, names = contents.facts.keys, contents.names
    left_out = dict(report.dropped)
    left_out |= {double: f"the same picture as {keys[kept]}, joined" for kept, ds in joins.items() for double in ds}
    with ShardWriter(out, shard_size) as writer, progress("writing", report.num_samples, "samples") as advance:
        sample = -1
        for url, name, part in zip(contents.urls, names, contents.parts, strict=True):
            for raw in raw_samples(url, part):
                sample += 1
                advance()
                if sample in left_out:
                    continue
                pair = read_pair(raw)
                others = (read_pair(contents.read(double)).captions for double in joins[sample])
                add(writer, raw, pair, gained(pair.captions, others), name)
        lines = [
            {"key": keys[sample], "shard": names[contents.facts.shards[sample]], "reason": reason}
            for sample, reason in sorted(left_out.items())
        ]
        if lines:
            write_lines(writer.folder / "skipped.jsonl", lines)
    return Cleaned(writer.num_samples, len(report.dropped), len(left_out) - len(report.dropped))


def doubles_to_join(report: CheckReport) -> dict[int, list[int]]:
    """Gather, by the first sample that is kept, the later ones with the same picture and label, or with no label."""
    labels = report.contents.facts.labels
    joins: dict[int, list[int]] = defaultdict(list)
    keeper: dict[tuple[int, int | None], int] = {}
    for double, first in sorted(report.doubles.items()):
        for sample in (first, double):
            if sample not in report.dropped:
                keeper.setdefault((first, None), sample)
                keeper.setdefault((first, labels[sample]), sample)
        if double not in report.dropped and (kept := keeper[first, labels[double]]) != double:
            joins[kept].append(double)
    return joins


def gained(own: Sequence[str], others: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """List, each once, the captions of a sample's doubles that it does not have itself."""
    known, new = set(map(plain, own)), {}
    for text in chain.from_iterable(others):
        if plain(text) not in known:
            new.setdefault(plain(text), text)
    return tuple(new.values())


def add(writer: ShardWriter, raw: RawSample, pair: Pair, new: tuple[str, ...], shard: str) -> None:
    """Write one sample with all its members as they are; NEW captions join those of its .txt and .json.

    A .json that is missing is made, to name the source, and a .txt where none has the captions.
    """
    name = picture_extension(raw.members)
    extension = PLAIN.get(kind := name.rpartition(".")[2], kind)
    members = {extension if member == name else member: data for member, data in raw.members.items()}
    extra = {"source_key": raw.key, "source_shard": shard, **json_fields(raw.members)}
    captions = pair.captions + new
    written, row = members_of(writer.next_key, pair.image, extension, captions, extra, pair.label)
    if "json" not in members or (new and json_fields({"json": members["json"]})):
        members["json"] = written["json"]
    if new or (captions and not captions_of({"txt": members.get("txt", b"")})):
        members["txt"] = written["txt"]
    writer.add_members(members, row)
