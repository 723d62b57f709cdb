"""Write samples into shards the way img2dataset does, so that open_clip and webdataset read them too."""

import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from softmoe_clip.data_pipelines.new_folder import new_folder
from softmoe_clip.data_pipelines.shard_files import ShardFiles, members_of, write_synced
from softmoe_clip.data_pipelines.tar_index import INDEX_NAME, save_index
from softmoe_clip.data_pipelines.tar_walk import TarPart

MAX_SHARD_SIZE = 10_000  # the key's last four digits


class ShardWriter:
    """Write OUT/00000.tar, ... with keys of nine digits (shard number, then index), `sizes.json` and the byte index.

    Used in a `with`: OUT appears at its end, whole, and not at all where an error left it. Equal samples, equal bytes.
    """

    def __init__(self, out: str | Path, shard_size: int = 1000):
        check_shard_size(shard_size)
        self.out = Path(out)
        self.shard_size = shard_size
        self.num_samples = 0
        self._parts: list[TarPart] = []
        self._shard: ShardFiles | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> "ShardWriter":
        self.folder = self._cleanup.enter_context(new_folder(self.out))
        return self

    def __exit__(self, *error) -> bool | None:
        try:
            if error[0] is None:
                self._close_shard()
                finish_folder(self.folder, self._parts)
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
        key = self.next_key
        self.add_members(*members_of(key, image, extension, captions, extra, label))
        return key

    def add_members(self, members: dict[str, bytes], row: dict[str, Any]) -> None:
        """Append one sample with members as they are; ROW (see `members_of`) goes into the parquet."""
        shard, index = divmod(self.num_samples, self.shard_size)
        key = self.next_key
        if index == 0:
            self._close_shard()
            self._shard = ShardFiles(self.folder, f"{shard:05d}")
        self._shard.add(key, members, row)
        self.num_samples += 1

    @property
    def next_key(self) -> str:
        """The key of the sample that is added next."""
        shard, index = divmod(self.num_samples, self.shard_size)
        return f"{shard:05d}{index:04d}"

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._parts.append(self._shard.close())
            self._shard = None

    def _abandon(self) -> None:
        if self._shard is not None:
            self._shard.abandon()


def check_shard_size(shard_size: int) -> None:
    """Refuse a number of samples that the key has no digits for."""
    if not 1 <= shard_size <= MAX_SHARD_SIZE:
        raise ValueError(f"shard_size is {shard_size}: choose 1 to {MAX_SHARD_SIZE}")


def finish_folder(folder: Path, parts: Sequence[TarPart]) -> None:
    """Write what a folder of shards has once: `sizes.json` (open_clip's counts) and the byte index."""
    sizes = {part.name: len(part.keys) for part in parts}
    write_synced(folder / "sizes.json", json.dumps(sizes, indent=1) + "\n")
    save_index(folder / INDEX_NAME, parts)
