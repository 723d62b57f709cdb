"""Keep the index of a folder's tars in one file of plain arrays."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from softmoe_clip.data_pipelines.tar_walk import TarPart

INDEX_NAME = "index.npz"
INDEX_VERSION = 1


def save_index(path: str | Path, parts: Iterable[TarPart]) -> None:
    """Write the index of a folder's tars: plain arrays, no pickles; the file appears whole or not at all."""
    parts = list(parts)
    extensions = sorted({extension for part in parts for extension in part.extensions})
    ids = {extension: number for number, extension in enumerate(extensions)}
    text = {
        "version": INDEX_VERSION,
        "names": [part.name for part in parts],
        "keys": [part.keys for part in parts],
        "problems": [part.problems for part in parts],
        "extensions": extensions,
    }
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            np.savez(
                file,
                text=np.frombuffer(json.dumps(text).encode("ascii"), np.uint8),
                num_bytes=np.array([part.num_bytes for part in parts], np.int64),
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
    num_samples = [len(keys) for keys in text["keys"]]
    lengths = {len(arrays[name]) for name in ("extensions", "offsets", "sizes", "header_crcs")}
    if lengths != {arrays["num_members"].sum()} or len(arrays["starts"]) != sum(num_samples) + len(num_samples):
        raise ValueError("the arrays do not fit together")
    starts = np.split(arrays["starts"], np.cumsum([count + 1 for count in num_samples])[:-1])
    ends = np.cumsum(arrays["num_members"])[:-1]
    columns = [np.split(arrays[name], ends) for name in ("extensions", "offsets", "sizes", "header_crcs")]
    return [
        TarPart(
            text["names"][p],
            int(arrays["num_bytes"][p]),
            text["keys"][p],
            [text["extensions"][number] for number in columns[0][p]],
            starts[p],
            *(column[p] for column in columns[1:]),
            problems=text["problems"][p],
        )
        for p in range(len(num_samples))
    ]


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
