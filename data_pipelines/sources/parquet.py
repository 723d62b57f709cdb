"""Parquet as a table of picture names, or with the pictures themselves in it (as Hugging Face data sets have them)."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from softmoe_clip.data_pipelines.sources.items import SPLITS

SHARD_NAME = re.compile(r"([A-Za-z]+)[-_.]?\d*.*")


class PictureInParquet(NamedTuple):
    """A picture in a row of a row group: bytes, or a struct with `bytes`."""

    file: str
    column: str
    row_group: int
    row: int
    name: str

    def __call__(self) -> bytes:
        value = column_of_group(self.file, self.column, self.row_group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not data:
            raise ValueError("no picture in its row")
        return data


def parquet_rows(table: Path) -> tuple[Iterator[dict[str, Any]], str | None]:
    """Return the rows, with pictures read only when asked for, and the split that the file's name tells."""
    import pyarrow

    try:
        columns = picture_columns(table)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{table} is no Parquet file ({error}): export it again") from error
    name = SHARD_NAME.fullmatch(table.stem)
    split = name[1].lower() if name and name[1].lower() in SPLITS else None
    return rows(table, columns), split


def picture_columns(table: Path) -> set[str]:
    """Name the columns that hold bytes."""
    import pyarrow.parquet as pq
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    return {field.name for field in pq.read_schema(table) if holds_bytes(field.type)}


def rows(table: Path, pictures: set[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows; the bytes of pictures stay in the file."""
    import pyarrow
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(table) as file:
            others = [name for name in file.schema_arrow.names if name not in pictures]
            number = 0
            for group in range(file.num_row_groups):
                content = file.read_row_group(group, columns=others).to_pylist()
                content = content or [{} for _ in range(file.metadata.row_group(group).num_rows)]
                for row, values in enumerate(content):
                    name = f"{table.stem}/{number:08d}"
                    held = {c: PictureInParquet(str(table), c, group, row, name) for c in sorted(pictures)}
                    yield {**held, **values}
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{table} is damaged ({error}): export it again") from error


@lru_cache(maxsize=8)
def column_of_group(file: str, column: str, row_group: int) -> Any:
    """Read one column of a row group; the last few are kept, since pictures are asked for in order."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(row_group, columns=[column])[column]
