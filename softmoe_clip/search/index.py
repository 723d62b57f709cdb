"""Exact nearest-neighbour indices (faiss, inner product) over an embedding folder."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROWS_PER_BLOCK = 65_536
# What an index is made of. In this order it goes and in the other it comes: never the rest without its image.index.
COPIED = ("metadata", "meta.json")
INDICES = {"text.index": "text_emb", "image.index": "img_emb"}


def index(embeddings: str | Path, out: str | Path | None = None) -> Path:
    """Write `image.index` and `text.index` over an embedding folder, and return the folder that holds them.

    OUT is the embedding folder itself, or another one, which then gets its own copy of the metadata. Every row is
    scaled to length one, so that the inner product is the cosine. Raises ValueError where files are missing, where
    pictures, texts and metadata differ in rows, or where nothing can be written.
    """
    embeddings = Path(embeddings)
    check_rows(embeddings)
    out = Path(out) if out else embeddings
    elsewhere = out.resolve() != embeddings.resolve()
    if elsewhere:
        check_place(out)
    try:
        write_indices(embeddings, out, COPIED if elsewhere else ())
    except OSError as error:
        raise ValueError(
            f"cannot write the index to {out} ({error}): make room there or choose another folder with --out"
        ) from None
    return out


def check_place(out: Path) -> None:
    """Refuse a folder whose metadata are not those of an older index: they would be replaced."""
    if (out / "img_emb").exists():
        raise ValueError(f"{out} holds other embeddings: choose another folder with --out")
    for name in COPIED:
        if (out / name).exists() and not (out / "image.index").exists():
            raise ValueError(f"{out / name} belongs to no index: choose another folder with --out")


def write_indices(embeddings: Path, out: Path, copied: Sequence[str]) -> None:
    """Write both indices and copy what is to be copied; an older index stays until all is whole, then it goes."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".index.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        for name, kind in INDICES.items():
            write_index(embeddings, kind, partial / name)
        for name in copied:
            if (embeddings / name).is_dir():
                shutil.copytree(embeddings / name, partial / name)
            elif (embeddings / name).exists():
                shutil.copy(embeddings / name, partial / name)
        replace(out, partial, (*copied, *INDICES))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_index(embeddings: Path, kind: str, path: Path) -> None:
    """Write the index of one kind of embeddings; nothing where there are none."""
    import faiss

    flat = None
    for rows in unit_rows(embeddings, kind):
        flat = faiss.IndexFlatIP(rows.shape[1]) if flat is None else flat
        flat.add(rows)
    if flat is not None:
        # Not by its name: faiss does not hear of a disk that is full when it closes the file.
        with path.open("wb") as file:
            faiss.write_index(flat, faiss.PyCallbackIOWriter(file.write))


def replace(out: Path, partial: Path, names: Sequence[str]) -> None:
    """Put what `partial` holds in the place of everything of these names; on an error all is as before."""
    previous = out / ".index.previous"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    moves = [(out / name, previous / name) for name in names if (out / name).exists()]
    moves += [(partial / name, out / name) for name in reversed(names) if (partial / name).exists()]
    done = []
    try:
        for move in moves:
            os.rename(*move)
            done.append(move)
    except BaseException:
        for before, after in reversed(done):
            os.rename(after, before)
        previous.rmdir()
        raise
    shutil.rmtree(previous, ignore_errors=True)


def check_rows(embeddings: Path) -> None:
    """Refuse a folder without embeddings, or whose parts don't belong together."""
    import pyarrow.parquet as pq

    if not embeddings.is_dir():
        raise ValueError(f"no folder of embeddings at {embeddings}: write one with `softmoe-clip embed`")
    if read_meta(embeddings).get("features") == "trunk":
        raise ValueError(f"{embeddings} holds trunk features, to train on: embed once more without --features trunk")
    parts = part_files(embeddings, "img_emb")
    if not parts:
        raise ValueError(f"{embeddings} holds no img_emb/img_emb_*.npy: write it with `softmoe-clip embed`")
    with_text = bool(part_files(embeddings, "text_emb"))
    widths = set()
    for path in parts:
        part = path.stem.removeprefix("img_emb_")
        shape = load_part(path).shape
        widths.add(shape[1:])
        beside = {"metadata": embeddings / f"metadata/metadata_{part}.parquet"}
        if with_text:
            beside["text_emb"] = embeddings / f"text_emb/text_emb_{part}.npy"
        for kind, other in beside.items():
            if not other.exists():
                raise ValueError(
                    f"{other} is missing beside {path.name}: write the folder again with `softmoe-clip embed`"
                )
            if kind == "metadata":
                check_columns(other, pq.read_schema(other).names)
            rows = pq.read_metadata(other).num_rows if kind == "metadata" else len(load_part(other))
            if rows != shape[0]:
                raise ValueError(
                    f"{other} has {rows} rows and {path.name} has {shape[0]}: "
                    f"they are not from one run; write the folder again with `softmoe-clip embed`"
                )
    if len(widths) > 1:
        raise ValueError(f"the parts in {embeddings}/img_emb differ in width: {sorted(widths)}")


def check_columns(metadata: Path, columns: Sequence[str]) -> None:
    """Refuse metadata that do not say which picture a row is."""
    if not {"key", "image_path"} & set(columns):
        raise ValueError(
            f"{metadata} has neither a column `key` nor `image_path`, by which a hit is named: "
            f"add one, or write the folder again with `softmoe-clip embed`"
        )


def part_files(embeddings: Path, kind: str) -> list[Path]:
    """The .npy parts of one kind, in order of their number."""
    return sorted((embeddings / kind).glob(f"{kind}_*.npy"), key=lambda path: (len(path.name), path.name))


def load_part(path: Path) -> np.ndarray:
    """Map one part into memory; a file that is no 2-d array of numbers is refused."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no readable .npy file ({error}): write it again with `softmoe-clip embed`"
        ) from None
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise ValueError(f"{path} should hold rows of floats, it holds {rows.dtype} of shape {rows.shape}")
    return rows


def unit_rows(embeddings: Path, kind: str) -> Iterator[np.ndarray]:
    """Yield blocks of float32 unit vectors, block by block so that a set larger than memory passes through."""
    for path in part_files(embeddings, kind):
        part = load_part(path)
        for start in range(0, len(part), ROWS_PER_BLOCK):
            rows = np.ascontiguousarray(part[start : start + ROWS_PER_BLOCK], dtype=np.float32)
            if not np.isfinite(rows).all():
                raise ValueError(f"{path} holds a number that is not finite, after row {start}: embed the shards again")
            yield rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def read_meta(folder: Path) -> dict:
    """Read meta.json (model, shards); a folder from another tool has none, then the dict is empty."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        meta = None
    if not isinstance(meta, dict):
        raise ValueError(f"{path} is damaged, it holds no whole JSON object: write it again with `softmoe-clip embed`")
    return meta
