"""What a check finds: errors cost samples, warnings do not; a table of them, a JSON file, and a line for each."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from softmoe_clip.data_pipelines.samples import printable
from softmoe_clip.data_pipelines.shard_files import write_lines, write_synced

# Every kind, in the order of the table, with what it means.
ERRORS = {
    "broken tar": "a shard can't be read, or not to its end",
    "wrong count": "sizes.json or _stats.json says another number of samples",
    "duplicate key": "a key comes twice in a shard",
    "no picture": "a sample without a picture",
    "bad picture": "a picture that does not decode",
    "decompression bomb": "a picture over the limits, refused before it is decoded",
    "bad caption": "a sample whose captions are missing, empty or not readable",
}
WARNINGS = {
    "empty shard": "a shard without samples",
    "read otherwise": "samples of a shard that webdataset and open_clip would tear apart, or join",
    "repeated keys": "keys of a shard that earlier shards have, too",
    "split key": "the members of a sample lie in two shards",
    "only a label": "samples with a label and no caption",
    "same picture": "a picture that an earlier sample has, byte for byte",
    "other label": "a picture that an earlier sample has, byte for byte, with another label",
    "near picture": "a picture that looks nearly like an earlier one",
    "same caption": "a caption of several samples",
    "leaked picture": "a picture that the other set has, too, or nearly",
    "leaked pair": "a key with a caption that the other set has, too",
    "few shards": "fewer shards than the processes and workers that would read them",
}
KINDS = (*ERRORS, *WARNINGS)
NUM_SHOWN = 3  # of each kind, in the printed table


class Finding(TypedDict):
    """One thing that is wrong. The key is empty for a whole shard; `other` is the sample it was compared with."""

    severity: Literal["error", "warning"]
    kind: str
    shard: str
    key: str
    reason: str
    other: str


def finding(kind: str, shard: str, key: str, reason: str, other: str = "") -> Finding:
    """Make a finding; its kind says how severe it is. A name in a tar may hold any bytes: those of no text become ?."""
    severity = "error" if kind in ERRORS else "warning"
    key, reason, other = (text.encode("utf-8", "replace").decode() for text in (key, reason, other))
    return Finding(severity=severity, kind=kind, shard=shard, key=key, reason=reason, other=other)


def by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    """Group findings by kind, in the order of the table."""
    groups: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    for found in findings:
        groups[found["kind"]].append(found)
    return {kind: found for kind, found in groups.items() if found}


def write_findings(file: str | Path, about: dict, findings: Sequence[Finding]) -> Path:
    """Write a JSON file, and beside it a ledger, .jsonl, with one line for each finding; return the ledger's name."""
    file, ledger = Path(file), ledger_beside(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lines(ledger, findings)
    kinds = [
        {"severity": found[0]["severity"], "kind": kind, "count": len(found)}
        for kind, found in by_kind(findings).items()
    ]
    whole = {**about, "kinds": kinds, "findings": list(findings)}
    write_synced(file, json.dumps(whole, ensure_ascii=False, indent=1) + "\n")
    return ledger


def ledger_beside(file: str | Path) -> Path:
    """Name the ledger that goes with a report."""
    if Path(file).suffix != ".json":
        raise ValueError(f"{file} is no name for a report: it should end in .json (a .jsonl is written beside it)")
    return Path(file).with_suffix(".jsonl")


def print_findings(findings: Sequence[Finding]) -> None:
    """Print a table, a row for each kind with its first few findings."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), leading=1)
    table.add_column("")
    table.add_column("number", justify="right")
    table.add_column("what")
    table.add_column("the first of them", overflow="fold")
    for kind, found in by_kind(findings).items():
        colour = "red" if kind in ERRORS else "yellow"
        rows = [_shown(one) for one in found[:NUM_SHOWN]]
        if len(found) > NUM_SHOWN:
            rows.append(f"... and {len(found) - NUM_SHOWN:,} more")
        first = Text(found[0]["severity"], style=colour)
        table.add_row(first, f"{len(found):,}", Text(kind), Text("\n".join(rows)))
    console.print(table)


def _shown(found: Finding) -> str:
    place = f"{found['key']} in {found['shard']}" if found["key"] and found["shard"] else found["shard"]
    text = printable(f"{place}: {found['reason']}" if place else found["reason"])
    return text if len(text) <= 160 else text[:157] + "..."
