"""Tables of picture names and captions: CSV, TSV, JSONL, Parquet and the JSON forms, with columns of any name."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from softmoe_clip.data_pipelines.sources.items import NO_PICTURE, PICTURES, SourceItem, clean, read_text
from softmoe_clip.data_pipelines.sources.json_forms import read_json
from softmoe_clip.data_pipelines.sources.parquet import PictureInParquet, parquet_rows

PICTURE_FOLDERS = (".", "images", "Images", "pictures")
NAME_COLUMNS = (
    *("file_name", "filename", "image", "filepath", "file_path", "image_path", "image_name", "image_file", "path"),
    *("file", "img", "picture", "url"),
)
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "title", "sentences", "description", "comment", "raw")
SPLIT_COLUMNS = ("split", "set")
SPLIT_NAMES = {"restval": "train"}  # Karpathy's: the rest of COCO's val, which everyone trains on
KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet")


class Columns(NamedTuple):
    """What a user says about a table; what is None or empty is found by known names, or else by content."""

    image: str | None = None
    captions: tuple[str, ...] = ()
    root: Path | None = None  # the folder that the pictures' names start at


class Chosen(NamedTuple):
    """The columns of one row."""

    name: Any
    captions: tuple[Any, ...]
    split: Any


def read_table(table: Path, columns: Columns = Columns()) -> list[SourceItem]:
    """List the pictures of a table; several rows of a picture are joined. Raises ValueError with the line or entry."""
    kind, flat, split = table.suffix.lower(), False, None
    rows: Iterable[dict[str, Any]]
    folders: Sequence[Path] = [table.parent]
    if kind == ".json":
        rows, folders, flat = read_json(table)
    elif kind in (".jsonl", ".ndjson"):
        rows = jsonl_rows(table)
    elif kind in (".csv", ".tsv", ".txt"):
        rows = csv_rows(table, columns)
    elif kind == ".parquet":
        rows, split = parquet_rows(table)
    else:
        raise ValueError(
            f"{table} is no source: give a folder, or a .json, .jsonl, .csv, .tsv or .parquet with captions"
        )
    starts = folders if columns.root is None else [columns.root]
    return join_rows(table, rows, [start / name for start in starts for name in PICTURE_FOLDERS], columns, flat, split)


def join_rows(
    table: Path,
    rows: Iterable[dict[str, Any]],
    folders: Sequence[Path],
    columns: Columns,
    flat: bool = False,
    split: str | None = None,
) -> list[SourceItem]:
    """Make one item of each picture; several names may lead to one file.

    With `flat` a picture may also lie in a folder without those in its name. `split` is that of rows which name none.
    """
    folders = list(dict.fromkeys(folders))
    joined: dict[str, SourceItem] = {}
    first_name: dict[str, str] = {}  # of each name and each file: what the first row of that picture calls it
    unseen, number, row = set(columns.captions), 0, {}
    for number, row in enumerate(rows, 1):
        chosen = choose(table, number, row, columns)
        unseen.difference_update(row)
        captions = clean(text for column in chosen.captions for text in texts(row[column]))
        if isinstance(row[chosen.name], PictureInParquet):
            picture = row[chosen.name]
            name, path, read = picture.name, table, picture
        else:
            name, read = str(row[chosen.name]).strip(), None
            if name not in first_name:
                path = find(name, folders) or (find(Path(name).name, folders) if flat else None)
                first_name[name] = first_name.setdefault(os.path.realpath(path), name) if path else name
            name = first_name[name]
            if name in joined:
                joined[name] = joined[name]._replace(captions=joined[name].captions + captions)
                continue
        own_split = str(row[chosen.split]).strip() or None if chosen.split is not None else split
        taken = {chosen.name, *chosen.captions, chosen.split}
        extra = {
            str(column): value
            for column, value in row.items()
            if column not in taken and not isinstance(value, PictureInParquet)
        }
        item = SourceItem(name, path or folders[0] / name, captions, SPLIT_NAMES.get(own_split, own_split), extra)
        joined[name] = item._replace(problem=None if path else NO_PICTURE, read=read)
    if number and unseen:
        raise ValueError(f"{table} has no column {min(unseen)!r}: it has {', '.join(map(str, row)) or 'nothing'}")
    return list(joined.values())


def choose(table: Path, number: int, row: dict[str, Any], columns: Columns) -> Chosen:
    """Pick the columns of a row: those the user names, else known names, else what looks like a picture or a text."""
    known = {str(column).strip().lower(): column for column in row}
    name, caption, split = (
        next((known[c] for c in accepted if c in known and row[known[c]] is not None), None)
        for accepted in (NAME_COLUMNS, CAPTION_COLUMNS, SPLIT_COLUMNS)
    )
    if columns.image is not None:
        name = columns.image
        if row.get(name) is None:
            raise ValueError(
                f"{table}: entry {number} has no picture in the column {name!r}; "
                f"it has {', '.join(map(str, row)) or 'nothing'}"
            )
    elif name is None or _is_other_data(row[name]):
        name = next((column for column, value in row.items() if looks_like_picture(value)), None)
    if name is None:
        raise ValueError(
            f"{table}: entry {number} names no picture; it has {', '.join(map(str, row)) or 'nothing'}, "
            f"and one of {', '.join(NAME_COLUMNS)} is needed, or the option --image-column"
        )
    if columns.captions:
        return Chosen(name, tuple(column for column in columns.captions if column in row), split)
    if caption is None or caption == name:
        sentences = [column for column, value in row.items() if column not in (name, split) and has_words(value)]
        caption = sentences[0] if len(sentences) == 1 else None
    return Chosen(name, () if caption is None else (caption,), split)


def _is_other_data(value: Any) -> bool:
    return not isinstance(value, str | int | PictureInParquet)


def looks_like_picture(value: Any) -> bool:
    """True for picture bytes, and for text that ends as a picture's file name does."""
    return isinstance(value, PictureInParquet) or (
        isinstance(value, str) and os.path.splitext(value.strip())[1].lower() in PICTURES
    )


def has_words(value: Any) -> bool:
    """True for text of several words, or a list that holds some."""
    return any(" " in text.strip() for text in texts(value))


def find(name: str, folders: Sequence[Path]) -> Path | None:
    """Return the first of the folders' files of that name."""
    return next((folder / name for folder in folders if os.path.isfile(folder / name)), None)


def jsonl_rows(table: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one per line."""
    for number, line in enumerate(read_text(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{table}: line {number} is not valid JSON ({error}): correct or remove it") from error
        if not isinstance(row, dict):
            raise ValueError(f'{table}: line {number} should be {{"file_name": "...", "caption": "..."}}')
        yield row


def csv_rows(table: Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table whose first line names the columns; the separator is found there."""
    text = read_text(table)
    header, _, body = text.partition("\n")
    delimiter = "\t" if table.suffix.lower() == ".tsv" else max(",\t;|", key=header.count)
    names = next(csv.reader([header], delimiter=delimiter), [])
    given = [name for name in (columns.image, *columns.captions) if name is not None]
    if text.strip() and (missing := [name for name in given if name not in names]):
        raise ValueError(f"{table} has no column {missing[0]!r}: it has {', '.join(names)}")
    if text.strip() and (any(looks_like_picture(name) for name in names) or (len(names) < 2 and not given)):
        raise ValueError(
            f"{table}: its first line should name the columns, for example image{delimiter}caption; "
            f"it is {header.strip()[:80]!r}"
        )
    rows = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if len(row) > len(names):
                raise csv.Error(f"{len(row)} fields for {len(names)} columns; put captions in quotes")
            if row:
                yield dict(zip(names, row, strict=False))
    except csv.Error as error:
        line = rows.line_num + 1
        raise ValueError(f"{table}: line {line} is not valid CSV ({error}): correct or remove it") from error


def texts(value: Any) -> list[str]:
    """A caption column may hold a string, a list of them, or Karpathy's list of {"raw": ...}."""
    if isinstance(value, PictureInParquet):
        return []
    if isinstance(value, dict):
        value = next((value[column] for column in CAPTION_COLUMNS if column in value), "")
    if isinstance(value, list | tuple):
        return [text for entry in value for text in texts(entry)]
    return [value] if isinstance(value, str) else []  # pandas writes a missing caption as NaN
