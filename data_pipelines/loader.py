"""From shards to batches: training batches at any position of the global order, evaluation batches once through."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.ledger import Replacement
from softmoe_clip.data_pipelines.mixture import Mixture
from softmoe_clip.data_pipelines.pictures import Picture
from softmoe_clip.data_pipelines.read_ahead import ReadAhead
from softmoe_clip.data_pipelines.samples import BadSample, Pair, content_id, read_pair
from softmoe_clip.data_pipelines.tar_index import RawSample, ShardSet
from softmoe_clip.data_pipelines.tokenizers import Tokenizer
from softmoe_clip.data_pipelines.workers import computed_in_order

MAX_SUBSTITUTES = 20


class Batch(NamedTuple):
    """One process's part of a global batch; row i stands at positions[i] of the global order."""

    images: UInt8[Tensor, "b 3 y x"] | Float[Tensor, "b 3 y x"] | Float[Tensor, "b d"]  # see `pictures`
    token_ids: Int64[Tensor, "b l"]
    caption_ids: Int64[Tensor, " b"]  # the same for the same caption
    picture_ids: Int64[Tensor, " b"]  # the same for the same file
    keys: list[str]
    captions: list[str]
    positions: list[int]
    replaced: list[Replacement]


class Example(NamedTuple):
    """What one position gives: pixels, the caption that was drawn, and what had to be replaced on the way."""

    image: Tensor
    caption: str
    key: str
    picture_id: int
    replaced: list[Replacement]


def train_batches(
    shards: ShardSet,
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
    """Yield this rank's part of `num_batches` global batches of `batch_size`, from position `start` (samples seen) on.

    Batch k covers positions start + k * batch_size and on; rank r takes the r-th equal part. Crop, mirror and caption
    depend on (seed, position) alone, so the number of workers and ranks changes nothing. A bad sample's place goes to a
    substitute. `shuffle_captions` gives each picture a caption of another sample: a control experiment. `window` is
    the number of shards that are mixed with each other, 0 for all. Raises ValueError when nearly all samples are bad.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} is global and must divide by the {world_size} processes")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    if shuffle_captions and len(shards) < 2:
        raise ValueError("shuffle_captions needs two samples or more")
    order = Mixture.of(seed, shards.counts, shards.sources, window)
    draws = Draws(shards, order, picture, seed, caption, shuffle_captions)
    local_size = batch_size // world_size
    batches = TrainBatches(draws, tokenizer, start + rank * local_size, local_size, batch_size, num_batches)
    return computed_in_order(batches, num_workers, pin_memory=True, beside=ReadAhead(shards, order, start, batch_size))


@dataclass(frozen=True)
class TrainBatches:
    """The batches of one rank, each computable on its own."""

    draws: "Draws"
    tokenizer: Tokenizer
    first: int
    local_size: int
    batch_size: int
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> Batch:
        first = self.first + number * self.batch_size
        positions = list(range(first, first + self.local_size))
        examples = self.draws.examples(positions)
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


@dataclass(frozen=True)
class Draws:
    """What stands at each position: sample, caption and picture, all drawn from (seed, position)."""

    shards: ShardSet
    order: Mixture
    picture: Picture
    seed: int
    caption: Literal["random", "first"]
    shuffle_captions: bool

    def examples(self, positions: list[int]) -> list[Example]:
        """Make the examples of some positions; their bytes are read in the order they lie on disk."""
        samples = [self.order.sample_at(position) for position in positions]
        raws = {sample: self.shards.read(sample) for sample in sorted(set(samples))}
        return [self.example(*place, raws[place[1]]) for place in zip(positions, samples, strict=True)]

    def example(self, position: int, sample: int, raw: RawSample) -> Example:
        """Make the example of a position, from its own sample or from the first substitute that is good."""
        bad: list[BadSample] = []
        while True:
            try:
                image, caption, picture_id = self.picture_and_caption(position, sample, raw)
                replaced = [Replacement(position, b.key, b.shard, b.reason, raw.key) for b in bad]
                return Example(image, caption, raw.key, picture_id, replaced)
            except BadSample as error:
                bad.append(error)
            if len(bad) > MAX_SUBSTITUTES:
                raise ValueError(
                    f"nearly all samples are bad: {len(bad)} in a row at position {position}, the last is {bad[-1]}; "
                    "run `softmoe-clip check` on these shards"
                )
            sample = self.order.substitute_at(position, len(bad) - 1)
            raw = self.shards.read(sample)

    def picture_and_caption(self, position: int, sample: int, raw: RawSample) -> tuple[Tensor, str, int]:
        """Draw from a generator of this position alone, the caption first, then the crop; and the picture's id."""
        pair = captioned(raw)
        rng = np.random.default_rng([self.seed, position])
        captions = self.captions_of_another(pair, rng) if self.shuffle_captions else pair.captions
        caption = captions[rng.integers(len(captions))] if self.caption == "random" else captions[0]
        try:
            return self.picture(pair.image, sample, rng), caption, content_id(pair.image)
        except ValueError as error:
            raise BadSample(pair.key, pair.shard, str(error)) from None

    def captions_of_another(self, pair: Pair, rng: np.random.Generator) -> tuple[str, ...]:
        """Draw the captions of a sample other than `pair`."""
        for _ in range(MAX_SUBSTITUTES):
            raw = self.shards.read(int(rng.integers(len(self.shards))))
            if (raw.key, raw.shard) == (pair.key, pair.shard):
                continue
            try:
                return captioned(raw).captions
            except BadSample:
                continue
        raise BadSample(pair.key, pair.shard, "no other sample with a caption was found for it")


def captioned(raw: RawSample) -> Pair:
    """Read a pair, which for training needs a caption even where it has a label."""
    pair = read_pair(raw)
    if not pair.captions:
        raise BadSample(pair.key, pair.shard, "no caption")
    return pair


class EvalBatch(NamedTuple):
    """Good samples in shard order; `indices` are their numbers in the shard set, `skipped` the bad ones met."""

    images: Float[Tensor, "b 3 y x"]
    captions: list[tuple[str, ...]]
    keys: list[str]
    labels: list[int | None]
    indices: list[int]
    skipped: list[BadSample]


def eval_batches(
    shards: ShardSet, transform: Callable[[Image.Image], Tensor], batch_size: int, num_workers: int = 0
) -> Iterator[EvalBatch]:
    """Yield every good sample once, in shard order, with all its captions; bad ones are listed, none is substituted.

    A batch that met bad samples is smaller. Raises ValueError when no sample is good.
    """
    held, skipped = None, []
    for batch in computed_in_order(EvalBatches(shards, transform, batch_size), num_workers):
        skipped += batch.skipped
        if batch.keys:
            if held is not None:
                yield held
            held, skipped = batch._replace(skipped=skipped), []
    if held is None:
        raise ValueError(
            f"none of the {len(shards)} samples can be used: {skipped[0] if skipped else 'they are empty'}"
        )
    yield held._replace(skipped=held.skipped + skipped)


@dataclass(frozen=True)
class EvalBatches:
    """Batches of consecutive samples, each computable on its own."""

    shards: ShardSet
    transform: Callable[[Image.Image], Tensor]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.shards) // self.batch_size)

    def __getitem__(self, number: int) -> EvalBatch:
        first = number * self.batch_size
        images, pairs, indices, skipped = [], [], [], []
        for index in range(first, min(first + self.batch_size, len(self.shards))):
            try:
                pair, image = self.pair_and_pixels(index)
            except BadSample as error:
                skipped.append(error)
                continue
            images.append(image)
            pairs.append(pair)
            indices.append(index)
        return EvalBatch(
            images=torch.stack(images) if images else torch.empty(0),
            captions=[pair.captions for pair in pairs],
            keys=[pair.key for pair in pairs],
            labels=[pair.label for pair in pairs],
            indices=indices,
            skipped=skipped,
        )

    def pair_and_pixels(self, index: int) -> tuple[Pair, Float[Tensor, "3 y x"]]:
        """Decode one sample at full size, as the model's own transform expects."""
        pair = read_pair(self.shards.read(index))
        try:
            image = decode_rgb(pair.image)
        except ValueError as error:
            raise BadSample(pair.key, pair.shard, str(error)) from None
        return pair, self.transform(image)
