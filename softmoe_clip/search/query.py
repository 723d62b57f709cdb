"""Ask an index: a sentence or a picture in, the nearest pictures or captions out."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.samples import printable
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.search.index import check_columns, read_meta


class Hit(NamedTuple):
    """One answer: its cosine with the query, and where it is."""

    score: float
    key: str
    caption: str
    row: int
    shard: str


class OpenIndex(NamedTuple):
    """An index folder in memory: the faiss indices (text may be absent), the metadata table, and meta.json."""

    image: Any
    text: Any | None
    rows: Any
    meta: dict


def open_index(folder: str | Path) -> OpenIndex:
    """Read an index folder; raises ValueError naming what is missing."""
    import faiss
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    if not (folder / "image.index").exists():
        raise ValueError(f"{folder} holds no image.index: make it with `softmoe-clip index {folder}`")
    found = {}
    for name in ("image", "text"):
        path = folder / f"{name}.index"
        try:
            found[name] = faiss.read_index(str(path)) if path.exists() else None
        except RuntimeError:
            raise ValueError(f"{path} is damaged: make it again with `softmoe-clip index {folder}`") from None
    parts = sorted((folder / "metadata").glob("metadata_*.parquet"), key=lambda path: (len(path.name), path.name))
    if not parts:
        raise ValueError(f"{folder} holds no metadata/metadata_*.parquet: make it again with `softmoe-clip embed`")
    rows = pa.concat_tables([pq.read_table(path) for path in parts], promote_options="default")
    check_columns(folder / "metadata", rows.column_names)
    for name, flat in found.items():
        if flat is not None and flat.ntotal != rows.num_rows:
            raise ValueError(
                f"{folder}/{name}.index has {flat.ntotal} rows and its metadata {rows.num_rows}: "
                f"make the index again with `softmoe-clip index {folder}`"
            )
    return OpenIndex(found["image"], found["text"], rows, read_meta(folder))


def search(
    index: str | Path | OpenIndex,
    query: str | None = None,
    image: str | Path | None = None,
    k: int = 10,
    loaded=None,
    among: Literal["images", "captions"] = "images",
    device: str = "cpu",
    model: str | None = None,
) -> list[Hit]:
    """Return the `k` nearest rows to a sentence or to a picture file, best first.

    `loaded` is a LoadedModel; without one, `model` is loaded, or else the model that the index says it was made with.
    `among="captions"` compares with the rows' caption vectors instead of their picture vectors.
    """
    if bool(query and query.strip()) == bool(image):
        raise ValueError("search needs either a query in words or a picture (--image FILE), and not both")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    opened = index if isinstance(index, OpenIndex) else open_index(index)
    encoder = encoder_for(opened, loaded, device, model)
    vector = encoder.texts([query]) if query else encoder.images(read_picture(image, encoder.transform)[None])
    return nearest(opened, vector[0], k, among)


def nearest(opened: OpenIndex, vector: np.ndarray, k: int = 10, among: str = "images") -> list[Hit]:
    """Return the `k` rows with the greatest cosine to a unit vector, best first; fewer where the index is smaller."""
    flat = opened.image if among == "images" else opened.text
    if flat is None:
        raise ValueError("this index has no text.index: its embedding folder holds no text_emb")
    if flat.d != len(vector):
        raise ValueError(
            f"the model gives vectors of width {len(vector)}, the index holds width {flat.d}: not its model"
        )
    scores, rows = flat.search(np.ascontiguousarray(vector[None], dtype=np.float32), min(k, flat.ntotal))
    table = opened.rows.take(rows[0]).to_pylist()
    return [
        Hit(
            float(score),
            first_text(row, "key", "image_path"),
            first_text(row, "caption"),
            int(place),
            first_text(row, "shard"),
        )
        for score, place, row in zip(scores[0], rows[0], table, strict=True)
    ]


def first_text(row: dict, *columns: str) -> str:
    """Return the first of these columns that has a value, as text: other tools write numbers for keys."""
    return next((str(row[name]) for name in columns if row.get(name) not in (None, "")), "")


def encoder_for(opened: OpenIndex, loaded=None, device: str = "cpu", model: str | None = None):
    """Make an Encoder from a LoadedModel, or from the model that is named, here or in meta.json."""
    from softmoe_clip.eval.encoder import Encoder
    from softmoe_clip.models.store import load

    if loaded is None:
        name = model or opened.meta.get("model")
        if not name:
            raise ValueError("the index does not name the model that made it: give that with --model MODEL")
        loaded = load(name, device=device)
    return Encoder(loaded.model, loaded.tokenizer, loaded.transform, device=device)


def read_picture(path: str | Path, transform):
    """Decode a picture file the way samples are decoded, and give it the model's own transform."""
    from softmoe_clip.data_pipelines.images import decode_rgb

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no picture at {path}")
    try:
        return transform(decode_rgb(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path} can't be used as a picture: {error}") from None


def thumbnails(opened: OpenIndex, hits: Sequence[Hit]) -> list[bytes]:
    """Read the encoded pictures of hits back from the shards that were embedded, in the order of the hits."""
    from softmoe_clip.data_pipelines.samples import read_pair, readable

    if not opened.meta.get("shards"):
        raise ValueError("the index does not name its shards, so its pictures can't be shown")
    shards = ShardSet.open(opened.meta["shards"])
    samples = [opened.rows.column("sample")[hit.row].as_py() for hit in hits]
    pairs = [read_pair(shards.read(sample)) for sample in samples]
    for hit, pair in zip(hits, pairs, strict=True):
        if readable(pair.key) != hit.key:
            raise ValueError(f"sample {hit.key} is no longer where it was: the shards changed; embed them again")
    return [pair.image for pair in pairs]


def hits_json(hits: Sequence[Hit], ensure_ascii: bool = False) -> str:
    """Write hits as one JSON array, one object per hit with the names of Hit's fields."""
    return json.dumps([hit._asdict() for hit in hits], indent=1, ensure_ascii=ensure_ascii)


def print_hits(hits: Sequence[Hit], as_json: bool = False) -> None:
    """Print one line per hit (score, shard:key, caption), or JSON."""
    if as_json:
        encoding = sys.stdout.encoding or "utf-8"  # a text in memory has none
        print(hits_json(hits, ensure_ascii=encoding.lower() != "utf-8"))
        return
    places = [f"{hit.shard}:{hit.key}" if hit.shard else hit.key for hit in hits]
    width = max(map(len, places), default=0)
    for hit, place in zip(hits, places, strict=True):
        print(printable(f"{hit.score:6.3f}  {place:{width}}  {' '.join(hit.caption.split())}"))
