"""The list of samples that were replaced because they could not be used: one JSON line each, `skipped.jsonl`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ESCAPED = "backslashreplace"  # a key is a file name in a tar, and need not be UTF-8; JSON reads it back


class Replacement(NamedTuple):
    """A bad sample that the order put at `position`, why it is bad, and the key that took its place."""

    position: int
    key: str
    shard: str
    reason: str
    substitute_key: str


def append_replaced(file: str | Path, replaced: Sequence[Replacement], step: int) -> None:
    """Write down what was replaced at a step; nothing is written, and no file made, when nothing was."""
    if not replaced:
        return
    append_lines(file, [json.dumps({**entry._asdict(), "step": step}, ensure_ascii=False) for entry in replaced])


def append_lines(file: str | Path, lines: Sequence[str]) -> None:
    """Add lines to a file, at once, so that a kill loses nothing.

    Raises OSError, one sentence, for a full disk and the like.
    """
    try:
        with open(file, "a", encoding="utf-8", errors=ESCAPED) as log:
            log.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise OSError(
            f"{file} could not be written ({error.strerror}): mend that and start the same command again to go on"
        ) from error


def read_ledger(file: str | Path) -> list[dict]:
    """Read all entries; lines that a kill or a bad copy damaged are left out."""
    lines = Path(file).read_bytes().splitlines() if Path(file).exists() else []
    return [entry for entry in map(entry_of, lines) if entry is not None]


def entry_of(line: bytes) -> dict | None:
    """Return what a line holds, None of one that is damaged."""
    try:
        entry = json.loads(line.decode())
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def cut_back_ledger(file: str | Path, last_step: int) -> None:
    """Drop entries after `last_step`: a resumed run meets those positions again."""
    if not Path(file).exists():
        return
    kept = [entry for entry in read_ledger(file) if entry.get("step", 0) <= last_step]
    part = Path(file).with_name(Path(file).name + ".part")
    part.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept), "utf-8", ESCAPED)
    part.replace(file)
