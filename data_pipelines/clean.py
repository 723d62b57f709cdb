"""Write a checked shard set anew, without what is wrong with it."""

from collections import defaultdict
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

    Of pictures that are the same byte for byte the first stays, and takes over the captions of its doubles. Nearly
    doubled pictures stay. Raises ValueError where nothing is left, or OUT is not empty.
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
                captions: dict[str, str] = {}
                for texts in (pair.captions, *(read_pair(contents.read(double)).captions for double in joins[sample])):
                    for text in texts:
                        captions.setdefault(plain(text), text)
                add(writer, raw, pair, tuple(captions.values()), name)
        lines = [
            {"key": keys[sample], "shard": names[contents.facts.shards[sample]], "reason": reason}
            for sample, reason in sorted(left_out.items())
        ]
        if lines:
            write_lines(writer.folder / "skipped.jsonl", lines)
    return Cleaned(writer.num_samples, len(report.dropped), len(left_out) - len(report.dropped))


def doubles_to_join(report: CheckReport) -> dict[int, list[int]]:
    """Gather, by the first sample that is kept, the later ones with the same picture."""
    joins: dict[int, list[int]] = defaultdict(list)
    keeper: dict[int, int] = {}
    for double, first in sorted(report.doubles.items()):
        if double in report.dropped:
            continue
        kept = keeper.setdefault(first, double if first in report.dropped else first)
        if kept != double:
            joins[kept].append(double)
    return joins


def add(writer: ShardWriter, raw: RawSample, pair: Pair, captions: tuple[str, ...], shard: str) -> None:
    """Write one sample with all its members; only the .json, and a .txt that does not say these captions, are new."""
    name = picture_extension(raw.members)
    extension = PLAIN.get(kind := name.rpartition(".")[2], kind)
    members = {extension if member == name else member: data for member, data in raw.members.items()}
    extra = {"source_key": raw.key, "source_shard": shard, **json_fields(raw.members)}
    written, row = members_of(writer.next_key, pair.image, extension, captions, extra, pair.label)
    members["json"] = written["json"]
    if "txt" not in members or captions_of({"txt": members["txt"]}) != captions:
        members["txt"] = written["txt"]
    writer.add_members(members, row)
