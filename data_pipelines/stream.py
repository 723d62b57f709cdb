"""Training batches from what cannot be indexed, `pipe:` commands that print tars, through webdataset's own pipeline."""

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from softmoe_clip.data_pipelines.ledger import Replacement
from softmoe_clip.data_pipelines.loader import Batch, Example, captioned
from softmoe_clip.data_pipelines.pictures import Picture
from softmoe_clip.data_pipelines.samples import BadSample, Pair, content_id
from softmoe_clip.data_pipelines.tar_index import RawSample
from softmoe_clip.data_pipelines.tokenizers import Tokenizer
from softmoe_clip.data_pipelines.workers import computed_in_order

SHUFFLED = 1000  # samples that each reader holds and draws from
MAX_BAD = 1000  # samples in a row
SECONDS_TO_END = 5
ROUND_ORDER = 7  # told apart from the draws of `order`
STATEMENT = (
    "data.train is streamed, so resume is per shard: a run that goes on begins with shards in a fresh order, its place "
    "inside a shard is not kept; and the order depends on the number of processes and workers"
)


@dataclass(frozen=True)
class Stream:
    """Commands and files that are read from their beginning to their end, round after round."""

    urls: tuple[str, ...]
    counts: tuple[int, ...] = field(default=(), init=False)  # of samples: unknown

    def __len__(self) -> int:
        return 0

    def fingerprint(self) -> str:
        """Hash what is known: the addresses."""
        return hashlib.sha256(json.dumps(self.urls).encode()).hexdigest()


def stream_batches(
    stream: Stream,
    tokenizer: Tokenizer,
    *,
    picture: Picture,
    batch_size: int,
    seed: int,
    start: int = 0,
    num_batches: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    caption: Literal["random", "first"] = "random",
    shuffle_captions: bool = False,
    window: int = 0,
) -> Iterator[Batch]:
    """Yield batches as `train_batches` does, with positions that count samples; crops and captions depend on them.

    Each process and worker reads streams of its own, so there must be one for each process. A bad sample is replaced by
    the next good one. Raises ValueError when a whole round of the streams gives no sample.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} is global and must divide by the {world_size} processes")
    if shuffle_captions:
        raise ValueError("data.shuffle_captions draws captions from the whole set: it cannot be used with a stream")
    if len(stream.urls) < world_size:
        raise ValueError(
            f"{len(stream.urls)} stream(s) cannot be shared by {world_size} processes: give one for each, or more"
        )
    num_workers = min(num_workers, len(stream.urls) // world_size)
    batches = StreamBatches(
        stream, tokenizer, picture, batch_size, seed, start, num_batches, rank, world_size, num_workers, caption
    )
    return computed_in_order(batches, num_workers, pin_memory=True)


@dataclass
class StreamBatches:
    """The batches of one rank; each worker is asked for every so many of them in turn, and reads on where it is."""

    stream: Stream
    tokenizer: Tokenizer
    picture: Picture
    batch_size: int
    seed: int
    start: int
    num_batches: int
    rank: int
    world_size: int
    num_workers: int
    caption: Literal["random", "first"]
    raws: Iterator[RawSample] | None = None

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> Batch:
        if self.raws is None:
            readers = max(self.num_workers, 1)
            reader = self.rank * readers + number % readers
            self.raws = raw_samples(self.stream.urls, reader, self.world_size * readers, self.seed, self.start)
        local_size = self.batch_size // self.world_size
        first = self.start + number * self.batch_size + self.rank * local_size
        positions = list(range(first, first + local_size))
        examples = [self.example(position) for position in positions]
        captions = [example.caption for example in examples]
        return Batch(
            images=torch.stack([example.image for example in examples]),
            token_ids=self.tokenizer(captions),
            caption_ids=torch.tensor([content_id(caption) for caption in captions]),
            picture_ids=torch.tensor([example.picture_id for example in examples]),
            keys=[example.key for example in examples],
            captions=captions,
            positions=positions,
            replaced=[entry for example in examples for entry in example.replaced],
        )

    def example(self, position: int) -> Example:
        """Make the example of a position of the first sample that is good."""
        bad: list[BadSample] = []
        for raw in self.raws:
            rng = np.random.default_rng([self.seed, position])
            try:
                pair = captioned(raw)
                drawn = pair.captions[rng.integers(len(pair.captions)) if self.caption == "random" else 0]
                image = picture_of(pair, self.picture, rng)
            except BadSample as error:
                bad.append(error)
                if len(bad) > MAX_BAD:
                    raise ValueError(
                        f"nearly all samples are bad: {len(bad)} in a row at position {position}, the last is {error}; "
                        "save the stream to a file and run `softmoe-clip check` on it"
                    ) from None
                continue
            replaced = [Replacement(position, b.key, b.shard, b.reason, raw.key) for b in bad]
            return Example(image, drawn, raw.key, content_id(pair.image), replaced)
        raise AssertionError("streams begin again at their end")


def picture_of(pair: Pair, picture: Picture, rng: np.random.Generator) -> torch.Tensor:
    """Turn the picture of a pair into pixels."""
    try:
        return picture(pair.image, -1, rng)  # samples of a stream have no numbers
    except ValueError as error:
        raise BadSample(pair.key, pair.shard, str(error)) from None


def raw_samples(urls: tuple[str, ...], reader: int, num_readers: int, seed: int, start: int) -> Iterator[RawSample]:
    """Read one reader's share of the streams for ever, each round in a fresh order, and mix samples in a buffer."""
    import webdataset

    rounds = Rounds(urls, reader, num_readers, seed, start)
    pipeline = webdataset.DataPipeline(
        rounds.shards,
        webdataset.tarfile_to_samples(handler=rounds.broke_off),
        rounds.counted,
        webdataset.shuffle(SHUFFLED, rng=random.Random(f"{seed} {start} {reader}")),
    )
    for sample in pipeline:
        members = {name: data for name, data in sample.items() if not name.startswith("__")}
        yield RawSample(sample["__key__"], sample["__url__"], members)


@dataclass
class Rounds:
    """Which stream comes when, and how they end."""

    urls: tuple[str, ...]
    reader: int
    num_readers: int
    seed: int
    start: int
    num_samples: int = 0
    problem: str = "it is empty"

    def shards(self) -> Iterator[dict]:
        """Yield one stream after the other; a round without a sample is the last."""
        number, before = 0, 0
        while True:
            bits = np.random.PCG64([self.seed, self.start, number, ROUND_ORDER]).random_raw(len(self.urls))
            for place in np.argsort(bits, kind="stable")[self.reader :: self.num_readers]:
                shard = {"url": self.urls[place]}
                try:
                    yield shard
                finally:
                    self.end(shard)
            if self.num_samples == before:
                raise ValueError(f"no sample came out of {shard['url']} ({self.problem}): try it in a shell")
            number, before = number + 1, self.num_samples

    def counted(self, samples: Iterator[dict]) -> Iterator[dict]:
        """Count what comes out."""
        for sample in samples:
            self.num_samples += 1
            yield sample

    def broke_off(self, error: Exception) -> bool:
        """Say that a stream ended too early, and go on with the next."""
        self.problem = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
        if self.num_samples:
            print(f"a stream broke off ({self.problem}): going on with the next", file=sys.stderr, flush=True)
        return True

    def end(self, shard: dict) -> None:
        """End the command behind a stream; one that is not read to its end has nobody left to write to."""
        stream = shard.get("stream")
        process = getattr(stream, "proc", None)
        if process is None:
            if stream is not None:
                stream.close()
            return
        process.stdout.close()
        try:
            status = process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return
        if status not in (0, 141, -13):  # the last two: it wrote on after its tar's end
            self.broke_off(OSError(f"{shard['url']} ended with status {status}"))
