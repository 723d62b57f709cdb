"""One shard as img2dataset writes it: NNNNN.tar, and beside it NNNNN.parquet and NNNNN_stats.json."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from softmoe_clip.data_pipelines.new_folder import sync
from softmoe_clip.data_pipelines.tar_walk import TarPart, index_tar

SUCCESS, FAILED = "success", "failed_to_resize"  # img2dataset's word for pictures that do not decode
TEXT_COLUMNS = ("url", "caption", "key", "status", "error_message", "exif", "sha256")
COLUMNS = (
    *("url", "caption", "key", "status", "error_message"),
    *("width", "height", "original_width", "original_height", "exif", "sha256"),
)


class ShardFiles:
    """A tar that grows sample by sample, and the table of its samples. Equal samples, equal bytes.

    All files have temporary names until `close`, which returns the tar's index. `sha256` then holds their hashes.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.rows: list[dict[str, Any]] = []
        self.sha256: dict[str, str] = {}
        self._digest = hashlib.sha256()
        self._file = open(folder / f"{name}.tar.part", "wb")  # noqa: SIM115

    def add(self, key: str, members: dict[str, bytes], row: dict[str, Any]) -> None:
        """Append the members of one sample; ROW has what is known of the parquet's columns."""
        self._write(b"".join(_member(f"{key}.{name}", data) for name, data in members.items()))
        self.rows.append({**row, "key": key, "status": SUCCESS})

    def leave_out(self, key: str, reason: str, row: dict[str, Any]) -> None:
        """Note a sample that could not be used: a row without a picture in the tar."""
        self.rows.append({**row, "key": key, "status": FAILED, "error_message": reason})

    def close(self) -> TarPart:
        """Finish the files, bring them to the disk, and give them their names, the tar last."""
        position = self._file.tell() + 2 * tarfile.BLOCKSIZE
        self._write(b"\0" * (2 * tarfile.BLOCKSIZE + -position % tarfile.RECORDSIZE))
        self._file.close()
        self.sha256[f"{self.name}.tar"] = self._digest.hexdigest()
        for name, data in ((f"{self.name}.parquet", self._parquet()), (f"{self.name}_stats.json", self._stats())):
            (self.folder / f"{name}.part").write_bytes(data)
            self.sha256[name] = hashlib.sha256(data).hexdigest()
        for name in reversed(self.sha256):
            sync(self.folder / f"{name}.part")
            os.replace(self.folder / f"{name}.part", self.folder / name)
        return index_tar(self.folder / f"{self.name}.tar")

    def abandon(self) -> None:
        """Close what is open, whatever state it is in."""
        with suppress(OSError):  # on a full disk the last flush fails once more
            self._file.close()

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)

    def _parquet(self) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([(name, pa.string() if name in TEXT_COLUMNS else pa.int32()) for name in COLUMNS])
        columns = {name: [_plain(row.get(name), name) for row in self.rows] for name in COLUMNS}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=schema), sink)
        return sink.getvalue().to_pybytes()

    def _stats(self) -> bytes:
        """The times stay 0, as in the tar, so that equal samples make equal bytes."""
        status = Counter(row["status"] if row["status"] == SUCCESS else row["error_message"] for row in self.rows)
        successes = status[SUCCESS]
        stats = {
            "count": len(self.rows),
            "successes": successes,
            "failed_to_download": 0,
            "failed_to_resize": len(self.rows) - successes,
            "duration": 0.0,
            "start_time": 0.0,
            "end_time": 0.0,
            "status_dict": {name: status[name] for name in sorted(status) if status[name]},
        }
        return (json.dumps(stats, indent=4) + "\n").encode()


def members_of(
    key: str,
    image: bytes,
    extension: str,
    captions: Iterable[str],
    extra: dict[str, Any] | None = None,
    label: int | None = None,
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the members of a sample, and its row for the parquet.

    A caption's line breaks become spaces, since the .txt holds one per line; empty captions are left out.
    """
    lines = [line for caption in captions if (line := " ".join(str(caption).split()))]
    about = {"caption": lines[0] if lines else "", "captions": lines, "key": key, "status": SUCCESS}
    about = {**(extra or {}), **about}
    members = {extension: image, "txt": "\n".join(lines).encode("utf-8", "replace")}
    members["json"] = json.dumps(about, ensure_ascii=False, default=str).encode("utf-8", "replace")
    if label is not None:
        members["cls"] = str(label).encode()
    return members, about


def write_synced(path: str | Path, text: str) -> None:
    """Write a small text file and bring it to the disk."""
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: str | Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write a small file of JSON lines and bring it to the disk."""
    write_synced(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def _plain(value: Any, column: str) -> str | int | None:
    """Fit a value into its column; fields of the same name with other contents are left out of the table."""
    if column in TEXT_COLUMNS:
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31 else None


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444  # time, user and group stay 0: equal samples, equal bytes
    padding = b"\0" * (-len(data) % tarfile.BLOCKSIZE)
    fits = len(os.fsencode(name)) <= tarfile.LENGTH_NAME
    return info.tobuf(tarfile.USTAR_FORMAT if fits else tarfile.GNU_FORMAT) + data + padding
