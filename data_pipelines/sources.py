"""Read pictures with captions as people keep them: a folder with .txt files, captions.json, CSV, TSV or JSONL."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TABLES = tuple(f"{stem}.{kind}" for stem in ("captions", "metadata") for kind in ("json", "jsonl", "csv", "tsv"))
PICTURE_FOLDERS = (".", "images", "Images", "pictures")
NAME_COLUMNS = (
    *("file_name", "filename", "image", "filepath", "file_path", "image_path", "image_name", "image_file", "path"),
    *("file", "img", "picture", "url"),
)
CAPTION_COLUMNS = ("captions", "caption", "text", "texts", "title", "sentences", "description", "comment", "raw")
SPLIT_COLUMNS = ("split", "set")
NO_PICTURE = "captions without a picture: the file is not there"
PICTURES = frozenset(
    f".{kind}"
    for kind in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "ppm", "pgm"),
        *("pbm", "pnm", "jp2", "j2k", "jpx", "avif", "ico", "cur", "icns", "tga", "psd", "dds", "pcx", "sgi", "qoi"),
        *("xbm", "xpm", "heic", "heif"),
    )
)


class SourceItem(NamedTuple):
    """One picture of a source and its captions; `problem` says why it can't be used."""

    name: str
    path: Path
    captions: tuple[str, ...]
    split: str | None
    extra: dict[str, Any]
    problem: str | None = None


def read_source(source: str | Path) -> list[SourceItem]:
    """List the pictures and captions of a folder (X.jpg + X.txt, or a captions.json/.csv/... in it) or of a table file.

    In a .txt each line is a caption. In a table, several rows of a picture are joined, and paths are relative to the
    table or to its `images` folder. Raises ValueError where nothing in it can be used.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise ValueError(f"the source {source} does not exist: check the path")
    if source.is_dir():
        table = next((source / name for name in TABLES if (source / name).is_file()), None)
        items = _read_table(table) if table else _read_folder(source)
    else:
        table, items = source, _read_table(source)
    if not items:
        raise ValueError(f"{table or source} is empty: it should hold pictures with captions")
    if not any(item.captions or item.problem for item in items):
        raise ValueError(f"none of the {len(items)} pictures in {source} has a caption: {_how_to_caption(table)}")
    if all(item.problem == NO_PICTURE for item in items):
        raise ValueError(
            f"{source} has captions but none of their {len(items)} pictures is there (first: {items[0].path}): "
            "put the pictures beside their captions"
        )
    return items


def _how_to_caption(table: Path | None) -> str:
    return "fill its caption column" if table else "put X.txt, one caption per line, beside X.jpg"


def _read_folder(folder: Path) -> list[SourceItem]:
    """Pair X.jpg with X.txt or X.jpg.txt; what has no partner is listed with its problem."""
    paths = list(_files(folder))
    texts = {path.with_suffix(""): path for path in paths if path.suffix.lower() == ".txt"}
    pictures = [path for path in paths if path.suffix.lower() in PICTURES]
    partner = {path: next((stem for stem in (path, path.with_suffix("")) if stem in texts), None) for path in pictures}
    items = [_item(folder, path, texts.get(stem)) for path, stem in partner.items()]
    alone = texts.keys() - set(partner.values())
    for text in sorted(texts[stem] for stem in alone):
        items.append(SourceItem(text.relative_to(folder).as_posix(), text, (), None, {}, NO_PICTURE))
    return items


def _item(folder: Path, path: Path, text: Path | None) -> SourceItem:
    captions, problem = (), None
    if text is not None:
        try:
            captions = _clean(_read_text(text).split("\n"))
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem is None and not os.path.isfile(path):
        problem = "not a file"
    return SourceItem(path.relative_to(folder).as_posix(), path, captions, None, {}, problem)


def _files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} can't be read ({error.strerror}): check its permissions") from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _read_table(table: Path) -> list[SourceItem]:
    kind = table.suffix.lower()
    if kind == ".json":
        rows, picture_folder = _json_rows(table)
    elif kind in (".jsonl", ".ndjson"):
        rows, picture_folder = _jsonl_rows(table), "."
    elif kind in (".csv", ".tsv", ".txt"):
        rows, picture_folder = _csv_rows(table), "."
    else:
        raise ValueError(f"{table} is no source: give a folder, or a .json, .jsonl, .csv or .tsv with captions")
    return _join_rows(table, rows, picture_folder)


def _join_rows(table: Path, rows: Iterable[dict[str, Any]], picture_folder: str) -> list[SourceItem]:
    folders = list(dict.fromkeys(table.parent / name for name in (picture_folder, *PICTURE_FOLDERS)))
    joined: dict[str, SourceItem] = {}
    for number, row in enumerate(rows, 1):
        columns = {str(column).strip().lower(): column for column in row}
        name_column, caption_column, split_column = (
            next((columns[c] for c in accepted if c in columns and row[columns[c]] is not None), None)
            for accepted in (NAME_COLUMNS, CAPTION_COLUMNS, SPLIT_COLUMNS)
        )
        if name_column is None:
            raise ValueError(
                f"{table}: entry {number} names no picture; it has {', '.join(map(str, row)) or 'nothing'}, "
                f"and one of {', '.join(NAME_COLUMNS)} is needed"
            )
        name = str(row[name_column]).strip()
        captions = _clean(_texts(row[caption_column])) if caption_column is not None else ()
        if name in joined:
            joined[name] = joined[name]._replace(captions=joined[name].captions + captions)
            continue
        split = str(row[split_column]).strip() or None if split_column is not None else None
        taken = {name_column, caption_column, split_column}
        extra = {str(column): value for column, value in row.items() if column not in taken}
        path = _find(name, folders)
        joined[name] = SourceItem(name, path or folders[0] / name, captions, split, extra, None if path else NO_PICTURE)
    return list(joined.values())


def _find(name: str, folders: list[Path]) -> Path | None:
    return next((folder / name for folder in folders if os.path.isfile(folder / name)), None)


def _json_rows(table: Path) -> tuple[list[dict[str, Any]], str]:
    """Read `{"images": [...]}`, COCO's form with "annotations" beside it, a plain list, or {name: captions}."""
    try:
        content = json.loads(_read_text(table))
    except ValueError as error:
        raise ValueError(f"{table} is not valid JSON ({error}): correct or export it again") from error
    picture_folder = "."
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        picture_folder, captions = str(content.get("image_dir", ".")), {}
        for annotation in content.get("annotations", ()):
            captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption", ""))
        content = content["images"]
        if captions:
            content = [{**image, "captions": captions.get(image.get("id"), [])} for image in content]
    elif isinstance(content, dict):
        content = [{"file_name": name, "captions": captions} for name, captions in content.items()]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f'{table} should hold {{"images": [{{"file_name": "...", "captions": ["..."]}}, ...]}}')
    return content, picture_folder


def _jsonl_rows(table: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_read_text(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{table}: line {number} is not valid JSON ({error}): correct or remove it") from error
        if not isinstance(row, dict):
            raise ValueError(f'{table}: line {number} should be {{"file_name": "...", "caption": "..."}}')
        yield row


def _csv_rows(table: Path) -> Iterator[dict[str, Any]]:
    text = _read_text(table)
    header, _, body = text.partition("\n")
    delimiter = "\t" if table.suffix.lower() == ".tsv" else max(",\t;|", key=header.count)
    columns = next(csv.reader([header], delimiter=delimiter), [])
    if text.strip() and not {column.strip().lower() for column in columns} & set(NAME_COLUMNS):
        raise ValueError(
            f"{table}: its first line should name the columns, for example image{delimiter}caption; "
            f"it is {header.strip()[:80]!r}"
        )
    rows = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if len(row) > len(columns):
                raise csv.Error(f"{len(row)} fields for {len(columns)} columns; put captions in quotes")
            if row:
                yield dict(zip(columns, row, strict=False))
    except csv.Error as error:
        line = rows.line_num + 1
        raise ValueError(f"{table}: line {line} is not valid CSV ({error}): correct or remove it") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


def _texts(value: Any) -> list[str]:
    """A caption column may hold a string, a list of them, or Karpathy's list of {"raw": ...}."""
    if isinstance(value, dict):
        value = next((value[column] for column in CAPTION_COLUMNS if column in value), "")
    if isinstance(value, list | tuple):
        return [text for entry in value for text in _texts(entry)]
    return [value] if isinstance(value, str) else []  # pandas writes a missing caption as NaN


def _clean(captions: Iterable[str]) -> tuple[str, ...]:
    return tuple(text for caption in captions if (text := " ".join(caption.split())))
