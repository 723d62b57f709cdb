"""Tell the kind of a source and read it."""

from collections.abc import Sequence
from pathlib import Path

from softmoe_clip.data_pipelines.sources.class_folders import read_class_folders, split_folders
from softmoe_clip.data_pipelines.sources.items import NO_PICTURE, Prompts, Source, plain_prompt
from softmoe_clip.data_pipelines.sources.tables import KINDS, Columns, read_table
from softmoe_clip.data_pipelines.sources.text_folders import read_text_folder
from softmoe_clip.data_pipelines.sources.torchvision_sets import PREFIX, read_torchvision

TABLES = tuple(
    f"{stem}.{kind}" for stem in ("captions", "metadata") for kind in ("json", "jsonl", "csv", "tsv", "parquet")
)
# In the order of preference; the files of one pattern belong together.
OTHER_TABLES = ("dataset_*.json", "dataset.json", "annotations/captions_*.json", "captions_*.json")
PARQUETS = ("*.parquet", "data/*.parquet")


def read_source(
    source: str | Path,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    root: str | Path | None = None,
    prompts: Prompts | None = None,
) -> Source:
    """List the pictures and captions of a source.

    A source is a folder (X.jpg + X.txt, a table, COCO's annotations, shards, or one folder per class), a table file, a
    pattern of shards, or `torchvision:NAME`. In a .txt each line is a caption. In a table, several rows of a picture
    are joined, and paths are relative to the table, to its `images` folder, or to ROOT. PROMPTS makes the captions of
    a class. Raises ValueError where nothing in it can be used, or where what is asked for does not apply to it.
    """
    columns = Columns(image_column, tuple(caption_columns), Path(root).expanduser() if root is not None else None)
    if str(source).startswith(PREFIX):
        _refuse_columns(source, columns._replace(root=None))
        found = read_torchvision(str(source), columns.root or Path("."), prompts or plain_prompt)
        return _checked(found, source, "it is empty", prompts)
    path = Path(source).expanduser()
    if str(source).endswith(".tar"):
        _refuse_columns(source, columns)
        return _checked(_shards(str(source), prompts), source, "add a .txt to their samples", prompts)
    if not path.exists():
        raise ValueError(f"the source {path} does not exist: check the path")
    if tables := tables_of(path):
        found = Source([item for table in tables for item in read_table(table, columns)])
        advice = "fill its caption column, or name it with --caption-column"
        return _checked(found, tables[0] if len(tables) == 1 else path, advice, prompts, path)
    _refuse_columns(path, columns)
    if _has_shards(path):
        return _checked(_shards(str(path), prompts), path, "add a .txt to their samples", prompts)
    if (splits := split_folders(path)) is not None:
        return _checked(read_class_folders(splits, prompts or plain_prompt), path, "", prompts)
    return _checked(Source(read_text_folder(path)), path, _advice_on_texts(path), prompts)


def _advice_on_texts(folder: Path) -> str:
    """Say how captions are given to pictures in a folder; a table of a name that is not looked for may be meant."""
    tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in KINDS and path.is_file())
    instead = f", or give the table of captions instead of the folder ({tables[0]}?)" if tables else ""
    return f"put X.txt, one caption per line, beside X.jpg{instead}"


def tables_of(path: Path) -> list[Path]:
    """List the tables of captions that make up a source; none where it is of another kind."""
    if not path.is_dir():
        return [path]
    if found := [path / name for name in TABLES if (path / name).is_file()]:
        return found[:1]
    if found := next((sorted(files) for name in OTHER_TABLES if (files := list(path.glob(name)))), []):
        return found
    if _has_shards(path):
        return []  # the tables beside shards are img2dataset's record of them
    return next((sorted(files) for name in PARQUETS if (files := list(path.glob(name)))), [])


def _has_shards(path: Path) -> bool:
    from softmoe_clip.data_pipelines.sources.shards import has_shards

    return path.is_dir() and has_shards(path)


def _shards(pattern: str, prompts: Prompts | None) -> Source:
    from softmoe_clip.data_pipelines.sources.shards import read_shards

    return read_shards(pattern, prompts or plain_prompt)


def _refuse_columns(source: str | Path, columns: Columns) -> None:
    given = {"image-column": columns.image, "caption-column": columns.captions, "root": columns.root}
    if option := next((name for name, value in given.items() if value), None):
        raise ValueError(f"{source} is no table: leave out --{option}")


def _checked(
    found: Source, named: str | Path, advice: str, prompts: Prompts | None, source: str | Path | None = None
) -> Source:
    items, source = found.items, source or named
    if not items:
        raise ValueError(f"{named} is empty: it should hold pictures with captions")
    if prompts is not None and not found.classnames:
        raise ValueError(f"{source} has captions of its own, not classes: leave out --templates")
    if all(item.problem == NO_PICTURE for item in items):
        if all("://" in item.name for item in items):
            raise ValueError(
                f"{source} names its pictures by URL (first: {items[0].name}): download them first, for example with "
                "img2dataset, and pack what it writes"
            )
        raise ValueError(
            f"{source} has captions but none of their {len(items)} pictures is there (first: {items[0].path}): "
            "put the pictures beside their captions, or name their folder with --root"
        )
    if not any(item.captions or item.problem not in (None, NO_PICTURE) for item in items):
        num_pictures = sum(item.problem is None for item in items)
        raise ValueError(f"none of the {num_pictures} pictures in {source} has a caption: {advice}")
    return found
