"""From a model and shards to a folder of embeddings, in the layout that clip-retrieval and autofaiss read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.new_folder import new_folder
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.samples import json_fields, picture_extension, readable
from softmoe_clip.data_pipelines.tar_index import ShardSet

KINDS = {"img_emb": ".npy", "text_emb": ".npy", "metadata": ".parquet"}


class EmbedReport(NamedTuple):
    """What an embedding folder holds: rows written, and the samples that had no readable picture or caption."""

    out: str
    num_rows: int
    width: int
    skipped: list[dict]


def embed(
    encoder,
    shards_pattern,
    out: str | Path,
    rows_per_file: int = 100_000,
    model_name: str = "",
    dtype: Literal["float32", "float16"] = "float32",
    features: Literal["embedding", "trunk"] = "embedding",
) -> EmbedReport:
    """Write one row per picture: its unit vector, the unit vector of its first caption, and what is known about it.

    With `features` "trunk": what the image tower gives before its head, to train text towers on; no captions then.
    `model_name` is the MODEL that made the vectors, so that `search` can load it again. Nothing is left at OUT when the
    work is broken off; an OUT that already holds files is refused with a ValueError.
    """
    check_options(rows_per_file, dtype, features)
    shards = ShardSet.open(str(shards_pattern) if isinstance(shards_pattern, Path) else shards_pattern)
    with new_folder(Path(out)) as folder:
        for kind in kinds_of(features):
            (folder / kind).mkdir()
        num_rows, skipped = 0, []
        rows = embedded_rows(encoder, shards, skipped, features)
        for part, chunk in enumerate(chunks(rows, rows_per_file)):
            num_rows, width = num_rows + len(chunk), len(chunk[0]["image"])
            write_part(folder, part, chunk, dtype)
        if num_rows == 0:
            raise ValueError(
                f"none of the {len(shards)} samples of {shards_pattern} has a readable picture and caption; "
                f"run `softmoe-clip check` on it"
            )
        meta = {
            "model": absolute(model_name),
            "shards": [absolute(url) for url in shards.urls],
            "fingerprint": shards.fingerprint(),
            "num_rows": num_rows,
            "width": width,
            "dtype": dtype,
            "features": features,
            "rows_per_file": rows_per_file,
            "skipped": skipped,
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    return EmbedReport(str(out), num_rows, width, skipped)


def check_options(rows_per_file: int, dtype: str, features: str) -> None:
    """Refuse what cannot be written, before anything is read."""
    if rows_per_file < 1:
        raise ValueError(f"rows_per_file must be at least 1, got {rows_per_file}")
    if features not in ("embedding", "trunk") or dtype not in ("float32", "float16"):
        raise ValueError(
            f"--features must be embedding or trunk, --dtype float32 or float16; got {features!r} and {dtype!r}"
        )


def kinds_of(features: str) -> list[str]:
    """Name the folders that are written."""
    return [kind for kind in KINDS if kind != "text_emb" or features == "embedding"]


def embedded_rows(encoder, shards: ShardSet, skipped: list[dict], features: str) -> Iterator[dict]:
    """Yield one dict per readable sample, in shard order; what can't be read is appended to `skipped`."""
    from softmoe_clip.data_pipelines.loader import eval_batches

    with progress("embedding", total=len(shards), unit="pictures") as advance:
        for batch in eval_batches(shards, encoder.transform, encoder.batch_size, encoder.num_workers):
            skipped += [{"key": bad.key, "shard": bad.shard, "reason": bad.reason} for bad in batch.skipped]
            advance(len(batch.keys) + len(batch.skipped))
            if not batch.keys:
                continue
            if features == "trunk":
                images, texts = trunk_rows(encoder, batch.images), [None] * len(batch.keys)
            else:
                images = encoder.images(batch.images)
                texts = encoder.texts([captions[0] if captions else "" for captions in batch.captions])
            for image, text, sample, captions in zip(images, texts, batch.indices, batch.captions, strict=True):
                yield {"image": image, "text": text, **describe(shards, sample, captions)}


def trunk_rows(encoder, images) -> np.ndarray:
    """Run the image tower without its head: float32 (b, d), not normalised."""
    from softmoe_clip.models.trunk import trunk_features

    with encoder.evaluating():
        return trunk_features(encoder.model, images.to(encoder.device)).float().cpu().numpy()


def describe(shards: ShardSet, sample: int, captions: tuple[str, ...]) -> dict:
    """The metadata of one row; `sample` is the place in the shard set where the picture can be read again."""
    raw = shards.read(sample)
    extension = picture_extension(raw.members)
    extra = json_fields(raw.members)
    size = {side: extra.get(side) for side in ("width", "height")}
    return {
        "image_path": f"{raw.shard}/{readable(raw.key)}.{readable(extension)}",
        "caption": captions[0] if captions else "",
        "captions": list(captions),
        "key": readable(raw.key),
        "shard": raw.shard,
        "sample": sample,
        **{side: value if isinstance(value, int) else None for side, value in size.items()},
    }


def write_part(folder: Path, part: int, rows: list[dict], dtype: str) -> None:
    """Write the three files of one part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{part:04d}"
    for kind, key in (("img_emb", "image"), ("text_emb", "text")):
        vectors = [row.pop(key) for row in rows]
        if vectors[0] is not None:
            np.save(folder / f"{kind}/{kind}_{name}.npy", np.stack(vectors).astype(dtype))
    text, count = pa.string(), pa.int64()
    columns = {"image_path": text, "caption": text, "captions": pa.list_(text), "key": text, "shard": text}
    columns |= {"sample": count, "width": count, "height": count}
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(columns.items())))
    pq.write_table(table, folder / f"metadata/metadata_{name}.parquet")


def chunks(rows: Iterator[dict], size: int) -> Iterator[list[dict]]:
    """Cut a stream into lists of `size` (the last may be shorter)."""
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def absolute(name: str) -> str:
    """Make the name of a file or folder absolute, so that it holds from any working folder; leave other names alone."""
    path = Path(name.removeprefix("local-dir:"))
    return str(path.resolve()) if name and path.exists() else name
