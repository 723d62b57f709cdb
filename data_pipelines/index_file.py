"""Keep the index of a folder's tars in one file of plain arrays."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from softmoe_clip.data_pipelines.tar_walk import TarPart

INDEX_NAME = "index.npz"
INDEX_VERSION = 2


class Packed(Sequence):
    """Many short strings, decoded one at a time out of an array that forked processes share: millions open at once."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Packed":
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        return cls(
            np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(part) for part in encoded], dtype=np.int64)
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # raises IndexError, counts from the end
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented


class Chosen(Sequence):
    """Strings of which only a few differ, as numbers."""

    def __init__(self, numbers: np.ndarray, strings: list[str]):
        self.numbers, self.strings = numbers, strings

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index):
        found = self.numbers[index]
        return [self.strings[number] for number in found] if isinstance(index, slice) else self.strings[found]

    def __iter__(self) -> Iterator[str]:
        return (self.strings[number] for number in self.numbers.tolist())

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented


def save_index(path: str | Path, parts: Iterable[TarPart]) -> None:
    """Write the index of a folder's tars: plain arrays, no pickles; the file appears whole or not at all."""
    parts = list(parts)
    extensions = sorted({extension for part in parts for extension in part.extensions})
    ids = {extension: number for number, extension in enumerate(extensions)}
    text = {
        "version": INDEX_VERSION,
        "names": [part.name for part in parts],
        "problems": [part.problems for part in parts],
        "extensions": extensions,
    }
    keys = [Packed.of(part.keys) for part in parts]
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(
                file,
                text=np.frombuffer(json.dumps(text).encode("ascii"), np.uint8),
                num_bytes=np.array([part.num_bytes for part in parts], np.int64),
                num_samples=np.array([len(part.keys) for part in parts], np.int64),
                keys=_joined([packed.text for packed in keys], np.uint8),
                key_ends=_joined([packed.ends for packed in keys], np.int64),
                num_members=np.array([len(part.offsets) for part in parts], np.int64),
                starts=_joined([part.starts for part in parts], np.int64),
                extensions=_joined([np.array([ids[e] for e in part.extensions], np.int32) for part in parts], np.int32),
                offsets=_joined([part.offsets for part in parts], np.int64),
                sizes=_joined([part.sizes for part in parts], np.int64),
                header_crcs=_joined([part.header_crcs for part in parts], np.uint32),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_index(path: str | Path) -> dict[str, TarPart]:
    """Read an index by tar name; a missing, damaged or foreign one is empty: it can always be made again."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {part.name: part for part in _parts({name: arrays[name] for name in arrays.files})}
    except Exception:  # zipfile and numpy have a dozen ways to fail on a damaged file
        return {}


def _parts(arrays: dict[str, np.ndarray]) -> list[TarPart]:
    text = json.loads(arrays["text"].tobytes())
    if text["version"] != INDEX_VERSION:
        return []
    num_samples, num_members = arrays["num_samples"], arrays["num_members"]
    lengths = {len(arrays[name]) for name in ("extensions", "offsets", "sizes", "header_crcs")}
    if (
        lengths != {num_members.sum()}
        or len(arrays["key_ends"]) != num_samples.sum()
        or len(arrays["starts"]) != num_samples.sum() + len(num_samples)
        or not len(num_samples) == len(num_members) == len(text["names"]) == len(arrays["num_bytes"])
    ):
        raise ValueError("the arrays do not fit together")
    if np.any(arrays["extensions"] < 0) or np.any(arrays["extensions"] >= len(text["extensions"])):
        raise ValueError("an extension has no name")
    starts = np.split(arrays["starts"], np.cumsum(num_samples + 1)[:-1])
    key_ends = np.split(arrays["key_ends"], np.cumsum(num_samples)[:-1])
    keys = np.split(arrays["keys"], np.cumsum([ends[-1] if len(ends) else 0 for ends in key_ends])[:-1])
    ends = np.cumsum(num_members)[:-1]
    columns = [np.split(arrays[name], ends) for name in ("extensions", "offsets", "sizes", "header_crcs")]
    return [
        TarPart(
            text["names"][p],
            int(arrays["num_bytes"][p]),
            Packed(keys[p], key_ends[p]),
            Chosen(columns[0][p], text["extensions"]),
            starts[p],
            *(column[p] for column in columns[1:]),
            problems=text["problems"][p],
        )
        for p in range(len(num_samples))
    ]


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
