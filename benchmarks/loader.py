"""Time the training loader against open_clip's transform in a webdataset pipeline, and against decoding alone.

    python benchmarks/loader.py --pictures 512 --rounds 7

JPEGs of 640x480 become training crops of 224x224: pictures per second of one core, without worker processes. Every
contestant lives in a process of its own; they take turns, a few batches each, and medians are compared. The pictures
are drawn: noise with the spectrum of photographs (1/f), about 90 kB each. `--crop-scale` is the share of the picture
that crops take: 0.9 1.0 is open_clip's default, 0.05 1.0 the Soft MoE recipe's; both are measured. Results go into a
JSON beside this file.
"""

import argparse
import io
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter

from machine import machine, write_results
from turns import PLAIN, serve, take_turns

WIDTH, HEIGHT, IMAGE_SIZE, BATCH_SIZE = 640, 480, 224, 32
SCALES = {"open_clip's crops": (0.9, 1.0), "the recipe's crops": (0.05, 1.0)}


def main() -> None:
    options = read_options()
    if options.work_on:
        work(options)
        return
    import torch

    if options.shards is None:
        options.shards = Path(mkdtemp(prefix="loader-benchmark-"))
        write_shards(options.shards, options.pictures)
        sys.argv += ["--shards", str(options.shards)]
    names = [*(f"{name}, {scale}" for scale in SCALES for name in PIPELINES), *LIMITS]
    seconds = take_turns([(name, PLAIN) for name in names], options.rounds)
    rows = []
    for (name, _), value in seconds.items():
        theirs = seconds.get((name.replace(OURS, THEIRS), PLAIN), value)
        rows.append({"what": name, "pictures_per_second": round(options.batches * BATCH_SIZE / value, 1)})
        rows[-1]["times_open_clip"] = round(theirs / value, 2) if name not in LIMITS else None
        ratio = "" if name in LIMITS else f"{theirs / value:6.2f} x open_clip"
        print(f"{name:44} {rows[-1]['pictures_per_second']:8.1f} pictures/s {ratio}")
    found = {"machine": machine(), "torch": torch.__version__, "rounds": options.rounds, "rows": rows}
    write_results(options.out, found)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4, help="in each step")
    parser.add_argument("--shards", type=Path, help="shards to read; drawn ones if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/loader.json")
    parser.add_argument("--work-on", help=argparse.SUPPRESS)
    return parser.parse_args()


def write_shards(folder: Path, num_pictures: int) -> None:
    """Write a shard of drawn pictures, all with one caption."""
    import numpy as np
    from PIL import Image
    from webdataset import TarWriter

    rng = np.random.default_rng(0)
    across, down = np.meshgrid(np.fft.fftfreq(WIDTH), np.fft.fftfreq(HEIGHT))
    spectrum = 1 / np.maximum(np.hypot(across, down), 1 / WIDTH)
    with TarWriter(str(folder / "00000.tar")) as shard:
        for number in range(num_pictures):
            waves = np.fft.fft2(rng.standard_normal((3, HEIGHT, WIDTH))) * spectrum
            grey = np.fft.ifft2(waves).real
            pixels = (128 + 50 * grey / grey.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "JPEG", quality=75)
            shard.write({"__key__": f"{number:09}", "jpg": data.getvalue(), "txt": "noise with a spectrum"})


def ours(
    shards: Path, scale: tuple[float, float], image_size: int = IMAGE_SIZE, batch_size: int = BATCH_SIZE
) -> Iterator:
    """Our batches, tokens and all."""
    from softmoe_clip.data_pipelines.loader import train_batches
    from softmoe_clip.data_pipelines.pictures import RandomCrop
    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.data_pipelines.tokenizers import open_clip_tokenizer
    from softmoe_clip.data_pipelines.transforms import Augment

    picture = RandomCrop(image_size, Augment(crop_scale=scale))
    settings = {"picture": picture, "batch_size": batch_size, "seed": 0, "num_batches": 1_000_000}
    return train_batches(ShardSet.open(str(shards)), open_clip_tokenizer(), **settings)


def theirs(
    shards: Path, scale: tuple[float, float], image_size: int = IMAGE_SIZE, batch_size: int = BATCH_SIZE
) -> Iterator:
    """open_clip's transform and tokenizer in a webdataset pipeline, as open_clip_train puts them together."""
    import webdataset
    from open_clip import get_tokenizer
    from open_clip.transform import AugmentationCfg, image_transform

    transform = image_transform(image_size, is_train=True, aug_cfg=AugmentationCfg(scale=scale))
    tokenizer = get_tokenizer("ViT-B-32")
    pipeline = [
        webdataset.ResampledShards([str(tar) for tar in sorted(shards.glob("*.tar"))]),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(batch_size),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg", text="txt"),
        webdataset.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(batch_size),
    ]
    return iter(webdataset.DataPipeline(*pipeline))


def jpegs(shards: Path) -> Iterator[bytes]:
    """The bytes of all pictures, again and again."""
    from softmoe_clip.data_pipelines.samples import read_pair
    from softmoe_clip.data_pipelines.tar_index import ShardSet

    shard_set = ShardSet.open(str(shards))
    while True:
        for number in range(len(shard_set)):
            yield read_pair(shard_set.read(number)).image


def pillow(shards: Path) -> Iterator:
    """Decode whole pictures, nothing else."""
    from softmoe_clip.data_pipelines.images import decode_rgb

    return batches(decode_rgb(data) for data in jpegs(shards))


def torchvision(shards: Path) -> Iterator:
    """Decode whole pictures, nothing else."""
    import torch
    from torchvision.io import decode_jpeg

    return batches(decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)) for data in jpegs(shards))


def batches(items: Iterator) -> Iterator[list]:
    """Cut an endless row into batches."""
    while True:
        yield list(islice(items, BATCH_SIZE))


OURS, THEIRS = "softmoe-clip", "open_clip in webdataset"
PIPELINES: dict[str, Callable] = {THEIRS: theirs, OURS: ours}
LIMITS: dict[str, Callable] = {"decoding alone, Pillow": pillow, "decoding alone, torchvision": torchvision}


def work(options: argparse.Namespace) -> None:
    """Time one contestant, in its own process, on one core."""
    import torch

    torch.set_num_threads(1)
    if options.work_on in LIMITS:
        stream = LIMITS[options.work_on](options.shards)
    else:
        name, scale = options.work_on.split(", ")
        stream = PIPELINES[name](options.shards, SCALES[scale])

    def step() -> float:
        begin = perf_counter()
        for _ in islice(stream, options.batches):
            pass
        return perf_counter() - begin

    serve(step)


if __name__ == "__main__":
    main()
