"""Count what is in a shard set: captions, words and tokens, picture sizes and formats."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmoe_clip.data_pipelines.images import JPEG_FORMATS, open_picture, orientation
from softmoe_clip.data_pipelines.processes import in_order, usable_cores
from softmoe_clip.data_pipelines.progress import progress
from softmoe_clip.data_pipelines.samples import BadSample, read_pair
from softmoe_clip.data_pipelines.shards import find_shards
from softmoe_clip.data_pipelines.tar_index import tell_of_damage
from softmoe_clip.data_pipelines.tar_samples import FEW_SAMPLES, chunks_of, index_shards, raw_samples
from softmoe_clip.data_pipelines.tar_walk import TarPart

WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
HELD = 128  # chunks that are counted before they are added up
LONGER = 4  # captions are counted up to this many context lengths, to see what would be cut off
MOST_COUNTED = 256  # tokens of a caption for a lone sentencepiece model, which does not say a context length


class Stats(NamedTuple):
    """Histograms, value to count; sizes are (width, height) of the upright picture in pixels."""

    num_shards: int
    num_samples: int
    num_bad: int
    num_bytes: int
    captions_per_picture: Counter
    words_per_caption: Counter
    tokens_per_caption: Counter
    sizes: Counter
    formats: Counter
    captions_with_word: Counter
    context_length: int | None

    @property
    def num_captions(self) -> int:
        return self.words_per_caption.total()


class Chunk(NamedTuple):
    """A few samples of one tar, and the tokenizer to count with."""

    url: str
    part: TarPart
    tokenizer: tuple[str, int | None] | None


def count(
    pattern: str | Sequence[str],
    tokenizer: str | None = None,
    context_length: int | None = None,
    jobs: int | None = None,
) -> Stats:
    """Read all captions and the headers of all pictures; what can't be read is counted as bad, `check` says why.

    TOKENIZER and CONTEXT_LENGTH are what `load_tokenizer` takes. Raises ValueError where there are no samples.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}: give 1 or more")
    if context_length is not None and tokenizer is None:
        raise ValueError(f"the context length {context_length} says nothing without a tokenizer: give --tokenizer too")
    if context_length is not None and context_length < 2:
        raise ValueError(f"the context length is {context_length}: give 2 or more")
    jobs = jobs or usable_cores()
    counting = (str(tokenizer), context_length) if tokenizer else None
    context_length = loaded_tokenizer(*counting)[1] if counting else None
    urls = [shard.url for shard in find_shards(pattern)]
    found = list(zip(urls, index_shards(urls, jobs), strict=True))
    parts = [(url, part) for url, part in found if isinstance(part, TarPart)]
    unreadable = [f"{Path(url).name} {part}" for url, part in found if isinstance(part, str)]
    tell_of_damage([*unreadable, *(problem for _, part in parts for problem in part.problems)], len(urls))
    num_samples = sum(len(part.keys) for _, part in parts)
    if not num_samples:
        raise ValueError(f"the shards of {pattern} hold no samples: `softmoe-clip check` says more")
    tasks = (Chunk(url, chunk, counting) for url, part in parts for chunk in chunks_of(part))
    with progress("counting", num_samples, "samples") as advance:
        counted = []
        for stats in in_order(count_chunk, tasks, jobs if num_samples > FEW_SAMPLES else 1):
            counted.append(stats)
            advance(stats.num_samples)
            if len(counted) == HELD:
                counted = [added(counted)]
    return added(counted)._replace(num_shards=len(urls), context_length=context_length)


def count_chunk(chunk: Chunk) -> Stats:
    """Count the samples of one chunk."""
    stats = Stats(0, 0, 0, 0, *(Counter() for _ in range(6)), None)
    num_bad = num_bytes = 0
    captions: list[str] = []
    for raw in raw_samples(chunk.url, chunk.part):
        num_bytes += sum(map(len, raw.members.values()))
        try:
            pair = read_pair(raw)
            width, height, kind = header(pair.image)
        except (BadSample, ValueError):
            num_bad += 1
            continue
        stats.sizes[width, height] += 1
        stats.formats[kind] += 1
        stats.captions_per_picture[len(pair.captions)] += 1
        captions += pair.captions
    for caption in captions:
        words = WORD.findall(caption.casefold())
        stats.words_per_caption[len(words)] += 1
        stats.captions_with_word.update(set(words))
    if chunk.tokenizer and captions:
        stats.tokens_per_caption.update(num_tokens(loaded_tokenizer(*chunk.tokenizer)[0], captions))
    return stats._replace(num_samples=len(chunk.part.keys), num_bad=num_bad, num_bytes=num_bytes)


def header(data: bytes) -> tuple[int, int, str]:
    """Read width, height and format of an upright picture without decoding it."""
    picture = open_picture(data)
    width, height = picture.size
    turned = picture.format in JPEG_FORMATS and orientation(picture) >= 5
    return (height, width, picture.format) if turned else (width, height, picture.format)


@lru_cache(maxsize=1)
def loaded_tokenizer(source: str, context_length: int | None):
    """Load, once per process, a tokenizer that cuts later than the model's does, and that one's length, if known."""
    from softmoe_clip.data_pipelines.tokenizers import load_tokenizer

    if context_length is None and Path(source).is_file():
        return load_tokenizer(source, MOST_COUNTED), None
    context_length = context_length or load_tokenizer(source).context_length
    return load_tokenizer(source, LONGER * context_length), context_length


def num_tokens(tokenizer, captions: list[str]) -> list[int]:
    """Count the ids of each caption, its end token among them."""
    token_ids = tokenizer(captions).numpy()
    if tokenizer.eos_id is None:
        return (token_ids.shape[1] - np.argmax(token_ids[:, ::-1] != tokenizer.pad_id, axis=1)).tolist()
    ends = token_ids == tokenizer.eos_id
    return np.where(ends.any(1), np.argmax(ends, axis=1) + 1, token_ids.shape[1]).tolist()


def added(counted: Iterable[Stats]) -> Stats:
    """Add up the counts of chunks."""
    columns = zip(*counted, strict=True)
    return Stats(*(_sum(list(column)) for column in columns))


def _sum(column: list):
    if isinstance(column[0], Counter):
        total = Counter()
        for counter in column:
            total.update(counter)
        return total
    return None if column[0] is None else sum(column)


class Spread(NamedTuple):
    """What a table says of a histogram."""

    least: float
    median: float
    mean: float
    most_of: float  # 95 % are at or below
    most: float


def spread(histogram: dict[float, int]) -> Spread:
    """Summarise a histogram (value to count), which must not be empty."""
    values = np.array(sorted(histogram), np.float64)
    weights = np.array([histogram[value] for value in sorted(histogram)], np.float64)
    places = np.cumsum(weights) / weights.sum()
    median, most_of = (float(values[np.searchsorted(places, share - 1e-12)]) for share in (0.5, 0.95))
    return Spread(values[0], median, float(values @ weights / weights.sum()), most_of, values[-1])


def spreads(stats: Stats) -> Iterator[tuple[str, Spread]]:
    """Yield what a table shows, by name."""
    widths, heights, shorter, ratios = (Counter() for _ in range(4))
    for (width, height), number in stats.sizes.items():
        widths[width] += number
        heights[height] += number
        shorter[min(width, height)] += number
        ratios[width / height] += number
    histograms = {
        "captions per picture": stats.captions_per_picture,
        "words per caption": stats.words_per_caption,
        "tokens per caption": stats.tokens_per_caption,
        "width, pixels": widths,
        "height, pixels": heights,
        "shorter side, pixels": shorter,
        "width / height": ratios,
    }
    for name, histogram in histograms.items():
        if histogram:
            yield name, spread(histogram)


def print_stats(stats: Stats) -> None:
    """Print a small table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("", "least", "median", "mean", "95 % at most", "most"):
        table.add_column(column, justify="right" if column else "left")
    for name, numbers in spreads(stats):
        table.add_row(name, *(f"{number:,.2f}".rstrip("0").rstrip(".") for number in numbers))
    words = ", ".join(word for word, _ in stats.captions_with_word.most_common(12))
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(table)
    if words:
        console.print(f"most frequent words: {words}", markup=False)
    if stats.num_bad:
        console.print(f"{stats.num_bad:,} samples can't be read: `softmoe-clip check` says why", markup=False)
