"""Write samples into shards the way img2dataset does, so that open_clip and webdataset read them too."""

import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

from softmoe_clip.data_pipelines.new_folder import new_folder
from softmoe_clip.data_pipelines.tar_index import INDEX_NAME, save_index
from softmoe_clip.data_pipelines.tar_walk import TarPart, index_tar

MAX_SHARD_SIZE = 10_000  # the key's last four digits


class ShardWriter:
    """Write OUT/00000.tar, ... with keys of nine digits (shard number, then index), `sizes.json` and the byte index.

    Used in a `with`: OUT appears at its end, whole, and not at all where an error left it. Equal samples, equal bytes.
    """

    def __init__(self, out: str | Path, shard_size: int = 1000):
        if not 1 <= shard_size <= MAX_SHARD_SIZE:
            raise ValueError(f"shard_size is {shard_size}: choose 1 to {MAX_SHARD_SIZE}")
        self.out = Path(out)
        self.shard_size = shard_size
        self.num_samples = 0
        self._parts: list[TarPart] = []
        self._file: BinaryIO | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self.folder = self._cleanup.enter_context(new_folder(self.out))
        return self

    def __exit__(self, *error) -> bool | None:
        try:
            if error[0] is None:
                self._finish()
        except BaseException as failure:
            self._abandon()
            self._cleanup.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._abandon()
        return self._cleanup.__exit__(*error)

    def add(
        self,
        image: bytes,
        extension: str,
        captions: Iterable[str],
        extra: dict[str, Any] | None = None,
        label: int | None = None,
    ) -> str:
        """Append one sample and return its key.

        EXTENSION is the picture's ("jpg", "png", "webp"); EXTRA goes into .json, LABEL (a class number) into .cls.
        A caption's line breaks become spaces, since the .txt holds one per line; empty captions are left out.
        """
        lines = [line for caption in captions if (line := " ".join(str(caption).split()))]
        shard, index = divmod(self.num_samples, self.shard_size)
        key = f"{shard:05d}{index:04d}"
        about = {"caption": lines[0] if lines else "", "captions": lines, "key": key, "status": "success"}
        members = {extension: image, "txt": "\n".join(lines).encode("utf-8", "replace")}
        members["json"] = json.dumps({**(extra or {}), **about}, ensure_ascii=False).encode("utf-8", "replace")
        if label is not None:
            members["cls"] = str(label).encode()
        if index == 0:
            self._close_shard()
            self._file = open(self.folder / f"{shard:05d}.tar", "xb")  # noqa: SIM115
        self._file.write(b"".join(_member(f"{key}.{name}", data) for name, data in members.items()))
        self.num_samples += 1
        return key

    def _close_shard(self) -> None:
        if self._file is None:
            return
        position = self._file.tell() + 2 * tarfile.BLOCKSIZE
        self._file.write(b"\0" * (2 * tarfile.BLOCKSIZE + -position % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._parts.append(index_tar(self._file.name))

    def _finish(self) -> None:
        self._close_shard()
        sizes = {part.name: len(part.keys) for part in self._parts}
        write_synced(self.folder / "sizes.json", json.dumps(sizes, indent=1) + "\n")
        save_index(self.folder / INDEX_NAME, self._parts)

    def _abandon(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # on a full disk the last flush fails once more
                self._file.close()


def write_synced(path: str | Path, text: str) -> None:
    """Write a small text file and bring it to the disk."""
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444  # time, user and group stay 0: equal samples, equal bytes
    padding = b"\0" * (-len(data) % tarfile.BLOCKSIZE)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + padding
