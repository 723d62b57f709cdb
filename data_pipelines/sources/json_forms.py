"""The forms that captions take in one JSON file: a plain list, {name: captions}, COCO's and Karpathy's."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from softmoe_clip.data_pipelines.sources.items import read_text

COCO_NAME = re.compile(r"captions_([A-Za-z]+)(\d*)")


class JsonRows(NamedTuple):
    """A row for each picture, where the pictures may be, and whether the folders in their names may be missing."""

    rows: list[dict[str, Any]]
    folders: list[Path]
    flat: bool = False


def read_json(table: Path) -> JsonRows:
    """Read `{"images": [...]}`, COCO's form with "annotations" beside it, Karpathy's, a list, or {name: captions}.

    What belongs to a name may also be an object, with captions, split and whatever else is known. COCO names the split
    in the file's name (captions_val2017.json) and keeps annotations and pictures in folders side by side; Karpathy's
    entries have `filepath`, `filename` and `sentences`.
    """
    try:
        content = json.loads(read_text(table))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{table} is not valid JSON ({error}): correct or export it again") from error
    folders, flat = [table.parent], False
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        folders = [table.parent / str(content.get("image_dir", ".")), table.parent]
        images, annotations = content["images"], content.get("annotations")
        if _dicts(annotations) and _dicts(images):
            images, folders = _coco_rows(table, images, annotations), [*folders, *_coco_folders(table)]
        elif _dicts(images) and any("filename" in image and "filepath" in image for image in images):
            images, flat, folders = [_karpathy_row(image) for image in images], True, [*folders, table.parent.parent]
        content = images
    elif isinstance(content, dict):
        content = [
            {"file_name": name, **(told if isinstance(told, dict) else {"captions": told})}
            for name, told in content.items()
        ]
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError(f'{table} should hold {{"images": [{{"file_name": "...", "captions": ["..."]}}, ...]}}')
    return JsonRows(content, folders, flat)


def _dicts(entries: Any) -> bool:
    return isinstance(entries, list) and len(entries) > 0 and all(isinstance(entry, dict) for entry in entries)


def _coco_rows(
    table: Path, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    captions: dict[Any, list[str]] = {}
    for annotation in annotations:
        captions.setdefault(annotation.get("image_id"), []).append(annotation.get("caption", ""))
    name = COCO_NAME.fullmatch(table.stem)
    split = {"split": name[1]} if name else {}
    return [{**split, **image, "captions": captions.get(image.get("id"), [])} for image in images]


def _coco_folders(table: Path) -> list[Path]:
    places, name = [table.parent, table.parent.parent], COCO_NAME.fullmatch(table.stem)
    inner = [name[1] + name[2], f"images/{name[1]}{name[2]}"] if name else []
    return [*(place / folder for folder in inner for place in places), table.parent.parent]


def _karpathy_row(image: dict[str, Any]) -> dict[str, Any]:
    """Join folder and name; the numbers of the sentences, and their words one by one, are left out."""
    others = {name: image[name] for name in image if name not in ("filepath", "filename", "sentids")}
    folder = str(image.get("filepath") or ".").strip("/")
    return {"file_name": str(Path(folder) / str(image.get("filename", ""))), **others}
