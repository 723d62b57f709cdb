"""Train one step on batches of up to 32,768 pairs in chunks, on one CPU: the peak memory and the seconds of each.

    python benchmarks/large_batch.py

A small two-tower model with a Soft MoE layer and patch dropout takes drawn pictures of 32 x 32 pixels. Each batch has a
process of its own, whose memory is counted from after a first step on one chunk: pixels, embeddings with their
gradients, and the rows of logits that the loss compares at a time. The smallest batch is also run whole, without
chunks. Results go into a JSON beside this file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from machine import machine

ARCHITECTURE = {
    "embed_dim": 32,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "width": 64,
        "layers": 2,
        "head_width": 32,
        "patch_dropout": 0.5,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 1000,
        "width": 64,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
    },
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
MIB = 2**20


def main() -> None:
    options = read_options()
    if options.measure is not None:
        print(json.dumps(measure(options.measure, options.chunk_size or None)))
        return
    import torch

    rows = []
    for batch_size, chunk_size in [(options.batches[0], 0), *((size, options.chunk_size) for size in options.batches)]:
        line = [sys.executable, __file__, "--measure", str(batch_size), "--chunk-size", str(chunk_size)]
        rows.append(json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout))
        print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    found = {"machine": machine(), "torch": torch.__version__, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--chunk-size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/large_batch.json")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(batch_size: int, chunk_size: int | None) -> dict:
    """Run one step on one chunk, then one on the batch, and tell what the second took."""
    import torch

    from softmoe_clip.training.plan import peak_memory

    cpu = torch.device("cpu")
    stepper = new_stepper(chunk_size)
    stepper.forward_backward(drawn_batch(chunk_size or 128))
    before = peak_memory(cpu)
    batch = drawn_batch(batch_size)
    begin = perf_counter()
    loss = stepper.forward_backward(batch).loss.item()
    return {
        "batch_size": batch_size,
        "chunk_size": chunk_size,
        "loss": round(loss, 4),
        "seconds": round(perf_counter() - begin, 1),
        "peak_mib": round(peak_memory(cpu) / MIB),
        "more_than_one_chunk_mib": round((peak_memory(cpu) - before) / MIB),
        "pixels_mib": round(batch.images.numel() / MIB, 1),
        "embeddings_mib": round(2 * batch_size * ARCHITECTURE["embed_dim"] * 4 / MIB, 1),
        "one_block_of_logits_mib": round((chunk_size or batch_size) * batch_size * 4 / MIB, 1),
        "all_logits_mib": round(batch_size**2 * 4 / MIB),
    }


def new_stepper(chunk_size: int | None):
    """Make the small model, ready to train, and what runs its steps."""
    import torch

    from softmoe_clip.config import ModelConfig, MoEConfig
    from softmoe_clip.models.create import create_model
    from softmoe_clip.training.losses import LOGIT_BIAS_START, LOGIT_SCALE_START, LOSSES
    from softmoe_clip.training.masks import draw_by_position
    from softmoe_clip.training.step import Stepper

    starts = {"init_logit_scale": LOGIT_SCALE_START["siglip"], "init_logit_bias": LOGIT_BIAS_START["siglip"]}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "small.json"
        file.write_text(json.dumps(ARCHITECTURE))
        model = create_model(ModelConfig(str(file), image_moe=MoEConfig(num_experts=8), **starts)).train()
    draw_by_position(model)
    return Stepper(model, model, LOSSES["siglip"], PREPROCESS, torch.device("cpu"), seed=0, chunk_size=chunk_size)


def drawn_batch(num_pairs: int):
    """Draw pixels and ids."""
    import torch

    from softmoe_clip.data_pipelines.loader import Batch

    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, (num_pairs, 3, 32, 32), dtype=torch.uint8, generator=generator),
        token_ids=torch.randint(1, 1000, (num_pairs, 8), generator=generator),
        caption_ids=torch.arange(num_pairs),
        picture_ids=torch.arange(num_pairs),
        keys=[""] * num_pairs,
        captions=[""] * num_pairs,
        positions=list(range(num_pairs)),
        replaced=[],
    )


if __name__ == "__main__":
    main()
