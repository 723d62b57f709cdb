"""Pictures and captions on which two states of a model are compared, and their embeddings."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from softmoe_clip.data_pipelines.images import decode_rgb
from softmoe_clip.data_pipelines.sources import PICTURES, read_source
from softmoe_clip.models.store import LoadedModel

NUM_PAIRS = 64
BATCH = 16
# Short and long, with things, places and numbers: what a text tower is compared on where no captions are at hand.
SENTENCES = (
    "a dog",
    "two cats on a sofa",
    "a photo of the number seven",
    "A brown dog runs through the snow with a stick in its mouth.",
    "Three children in red jackets play football on a wet street, and an old man watches them.",
    "an aerial view of a harbour at night",
    "a bowl of soup beside a loaf of bread on a wooden table",
    "Nobody is in the picture.",
)


class Pairs(NamedTuple):
    """Transformed pictures (b, 3, y, x) and captions to compare on, not always as many, and what to call both."""

    images: Tensor
    captions: list[str]
    names: tuple[str, str]

    @property
    def described(self) -> tuple[str, str]:
        """Say on how many of what each tower is compared."""
        return f"{len(self.images)} {self.names[0]}", f"{len(self.captions)} {self.names[1]}"

    def halves(self, text: bool) -> tuple["Pairs", "Pairs"]:
        """Split by odd and even: what is fitted to one half is compared on the other. Captions matter for `text`."""
        counts = {"picture": len(self.images)} | ({"caption": len(self.captions)} if text else {})
        for what, number in counts.items():
            if number < 2:
                raise ValueError(f"one {what} is too few: give two or more, since half of them are compared on")
        return tuple(self._replace(images=self.images[i::2], captions=self.captions[i::2]) for i in (1, 0))


def pairs_to_compare(loaded: LoadedModel, pictures: str | None) -> Pairs:
    """Return up to 64 transformed pictures and captions; noise and a few sentences where there are none."""
    names = "pictures of random pixels, for want of real ones", "sentences of our own, for want of captions"
    if pictures is None:
        shape = (NUM_PAIRS // 4, 3, *loaded.picture_size)
        return Pairs(torch.randn(shape, generator=torch.Generator().manual_seed(0)), list(SENTENCES), names)
    folder = Path(pictures)
    is_folder = folder.is_dir() and not any(folder.glob("*.tar"))
    images, captions = (folder_pairs if is_folder else shard_pairs)(pictures, loaded.transform)
    names = f"pictures of {pictures}", f"captions of {pictures}" if captions else names[1]
    return Pairs(images, captions or list(SENTENCES), names)


def folder_pairs(folder: str, transform) -> tuple[Tensor, list[str]]:
    """Read the first pictures of a folder, in order of their names, and its first captions, if it has any."""
    files = [file for file in sorted(Path(folder).rglob("*")) if file.suffix.lower() in PICTURES and file.is_file()]
    images = [transform(read_picture(file)) for file in files[:NUM_PAIRS]]
    if not images:
        raise ValueError(f"no pictures and no shards in {folder}: check the path")
    try:
        items = read_source(folder).items
    except ValueError:  # no captions
        items = []
    return torch.stack(images), [item.captions[0] for item in items if item.captions][:NUM_PAIRS]


def read_picture(file: Path) -> Image.Image:
    """Decode one picture, or say which one cannot be."""
    try:
        return decode_rgb(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def shard_pairs(shards: str, transform) -> tuple[Tensor, list[str]]:
    """Read the first pictures of shards, and the first caption of each."""
    from softmoe_clip.data_pipelines.loader import eval_batches
    from softmoe_clip.data_pipelines.tar_index import ShardSet

    batch = next(iter(eval_batches(ShardSet.open(shards), transform, NUM_PAIRS)))
    return batch.images, [captions[0] for captions in batch.captions if captions]


def embedded(loaded: LoadedModel, pairs: Pairs, text: bool) -> list[Tensor]:
    """Embed pictures, and captions if asked for, a few at a time, in float64 for the comparison."""
    model = loaded.model
    with torch.inference_mode():
        found = [[model.encode_image(part) for part in pairs.images.split(BATCH)]]
        if text:
            token_ids = loaded.tokenizer(pairs.captions)
            found.append([model.encode_text(part) for part in token_ids.split(BATCH)])
    return [torch.cat(parts).double() for parts in found]


def check_finite(embeddings: list[Tensor], model: str) -> None:
    """Refuse a model whose embeddings are no numbers."""
    if not all(each.isfinite().all() for each in embeddings):
        raise ValueError(f"the embeddings of {model} are not finite: its weights are damaged, or the pictures are")
