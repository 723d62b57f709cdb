"""A folder with a .txt beside each picture, one caption per line."""

import os
from pathlib import Path

from softmoe_clip.data_pipelines.sources.items import (
    NO_PICTURE,
    PICTURES,
    SourceItem,
    clean,
    files_below,
    read_text,
)


def read_text_folder(folder: Path) -> list[SourceItem]:
    """Pair X.jpg with X.txt or X.jpg.txt; what has no partner is listed with its problem."""
    paths = list(files_below(folder))
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
            captions = clean(read_text(text).split("\n"))
        except (ValueError, OSError) as error:
            problem = str(error)
    if problem is None and not os.path.isfile(path):
        problem = "not a file"
    return SourceItem(path.relative_to(folder).as_posix(), path, captions, None, {}, problem)
