"""Time a training step: ours, a plain open_clip and torch loop with the same dense model, and Soft MoE beside dense.

    python benchmarks/train_step.py                          # the demo's towers at 64 pixels, 64 pairs
    python benchmarks/train_step.py --size S-16 --batch 16   # ViT-S/16 at 224 pixels

One process, float32, loss clip, AdamW. `data` reads JPEGs of 640x480 (drawn, see benchmarks/loader.py) without worker
processes, with open_clip's crops; the plain loop does so through open_clip's transform in a webdataset pipeline. Ours
runs with the memory settings that `softmoe-clip train` starts with on a CPU, the plain loop in a plain process; both
are also timed the other way round. The optimizer is timed alone on gradients that stay: fused, as ours is, and torch's
default, as open_clip's is. Every contestant lives in a process of its own; they take turns, medians are compared.
Results go into a JSON beside this file; on a GPU also the most memory, and the share of the machine's matmul rate.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter

from loader import ours as our_batches
from loader import theirs as their_batches
from loader import write_shards
from machine import machine, write_results
from turns import PLAIN, TUNED, serve, take_turns

OURS, THEIRS = "softmoe-clip", "open_clip and torch"
DENSE, SOFT = "PlainViT", "SoftMoE"
CROPS = (0.9, 1.0)  # open_clip's
NUM_PICTURES = 256

# Who, which towers, what of a step; and in which memory.
CONTESTANTS = {
    (OURS, DENSE, "step"): (TUNED, PLAIN),
    (THEIRS, DENSE, "step"): (PLAIN, TUNED),
    (OURS, DENSE, "step with data"): (TUNED, PLAIN),
    (THEIRS, DENSE, "step with data"): (PLAIN, TUNED),
    (OURS, DENSE, "forward and backward"): (TUNED,),
    (OURS, SOFT, "forward and backward"): (TUNED,),
    (OURS, DENSE, "optimizer"): (TUNED,),
    (OURS, SOFT, "optimizer"): (TUNED,),
    (THEIRS, SOFT, "optimizer"): (TUNED,),
}


def main() -> None:
    options = read_options()
    if options.work_on:
        work(options)
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.shards is None:
        options.shards = Path(mkdtemp(prefix="train-step-"))
        write_shards(options.shards, NUM_PICTURES)
        sys.argv += ["--shards", str(options.shards)]
    memories = {key: choices if device == "cpu" else choices[:1] for key, choices in CONTESTANTS.items()}
    rows = [(", ".join(key), memory) for key, choices in memories.items() for memory in choices]
    seconds = take_turns(rows, options.rounds)
    found = {"machine": machine(device), "torch": torch.__version__, "batch": options.batch, "rounds": options.rounds}
    found["milliseconds"] = {f"{name}, {memory}": round(1000 * value, 2) for (name, memory), value in seconds.items()}
    found["ratios"] = ratios(seconds)
    for name, value in (found["milliseconds"] | found["ratios"]).items():
        print(f"{name:66} {value:10.2f}")
    write_results(options.out, {f"{options.size}, batch {options.batch}, {device}": found})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="demo", help="of the towers: demo, S-16, B-16, ...")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shards", type=Path, help="shards to read; drawn ones if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/train_step.json")
    parser.add_argument("--work-on", help=argparse.SUPPRESS)
    return parser.parse_args()


def ratios(seconds: dict[tuple[str, str], float]) -> dict[str, float]:
    """Compare ours as it runs with the plain loop as it runs, both in tuned memory, and Soft MoE with dense."""

    def of(who: str, towers: str, what: str, memory: str = TUNED) -> float:
        name = f"{who}, {towers}, {what}"
        return seconds[name, memory if (name, memory) in seconds else PLAIN if (name, PLAIN) in seconds else TUNED]

    found = {}
    for what in ("step", "step with data"):
        found[f"open_clip / ours, {what}"] = of(THEIRS, DENSE, what, PLAIN) / of(OURS, DENSE, what)
        found[f"open_clip / ours, {what}, both tuned"] = of(THEIRS, DENSE, what) / of(OURS, DENSE, what)
    for what in ("forward and backward", "optimizer"):
        found[f"Soft MoE / dense, {what}"] = of(OURS, SOFT, what) / of(OURS, DENSE, what)
    found["torch's default AdamW / fused, Soft MoE"] = of(THEIRS, SOFT, "optimizer") / of(OURS, SOFT, "optimizer")
    return {name: round(value, 3) for name, value in found.items()}


def work(options: argparse.Namespace) -> None:
    """Time one contestant, in its own process."""
    import torch

    who, towers, what = options.work_on.split(", ")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make = {OURS: our_step, THEIRS: their_step}[who]
    forward_backward, optimizer, batches = make(options, f"{towers}-{options.size}", device, "data" in what)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if what == "optimizer":
        forward_backward(next(batches))

    def step() -> float:
        synchronize()
        begin = perf_counter()
        if what != "optimizer":
            forward_backward(next(batches))
        if what != "forward and backward":
            optimizer.step()
        if what != "optimizer":
            optimizer.zero_grad(set_to_none=True)
        synchronize()
        return perf_counter() - begin

    serve(step)


Parts = tuple[Callable, object, Iterator]


def our_step(options: argparse.Namespace, arch: str, device, data: bool) -> Parts:
    """Build a step of the training loop."""
    from softmoe_clip.training.losses import LOSSES
    from softmoe_clip.training.optim import make_optimizer
    from softmoe_clip.training.step import Stepper

    config, loaded = built(arch, device)
    stepper = Stepper(loaded.model, loaded.model, LOSSES["clip"], loaded.preprocess_cfg, device, config.seed)
    batches = our_batches(options.shards, CROPS, loaded.image_size, options.batch)
    batches = batches if data else repeat(next(batches))
    shortened = (cut(batch, loaded.tokenizer.context_length) for batch in batches)
    return stepper.forward_backward, make_optimizer(loaded.model, config.optim), shortened


def cut(batch, context_length: int):
    """Shorten CLIP's 77 ids to what the text tower takes."""
    return batch._replace(token_ids=batch.token_ids[:, :context_length])


def their_step(options: argparse.Namespace, arch: str, device, data: bool) -> Parts:
    """Build a plain loop's step: open_clip's loss, torch's AdamW in open_clip's two groups."""
    import torch
    from open_clip.loss import ClipLoss

    config, loaded = built(arch, device)
    model, loss = loaded.model, ClipLoss()
    small = [p for name, p in model.named_parameters() if p.ndim < 2 or "bn" in name or "ln" in name or "bias" in name]
    ids = {id(parameter) for parameter in small}
    large = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [{"params": small, "weight_decay": 0.0}, {"params": large, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr)
    batches = their_batches(options.shards, CROPS, loaded.image_size, options.batch)
    batches = batches if data else repeat(next(batches))

    def forward_backward(batch) -> None:
        images, token_ids = batch
        token_ids = token_ids[:, : loaded.tokenizer.context_length]
        out = model(images.to(device), token_ids.to(device))
        loss(out["image_features"], out["text_features"], out["logit_scale"]).backward()

    return forward_backward, optimizer, batches


def built(arch: str, device):
    """Build the model that both train, and its config."""
    from softmoe_clip.config import ModelConfig, TrainConfig
    from softmoe_clip.data_pipelines.config import DataConfig
    from softmoe_clip.data_pipelines.tokenizers import open_clip_tokenizer
    from softmoe_clip.models.create import architecture, create_model, folder_config
    from softmoe_clip.models.store import LoadedModel, transform_of

    model_config = ModelConfig(arch)
    text = architecture(model_config)["text_cfg"]
    tokenizer = open_clip_tokenizer(text.get("context_length", 77))
    sizes = tokenizer.vocab_size, tokenizer.context_length
    model = create_model(model_config, *sizes, eos_id=tokenizer.eos_id).to(device).train()
    config = TrainConfig("", model_config, DataConfig("shards"), loss="clip", steps=1)
    return config, LoadedModel(model, tokenizer, transform_of(model), folder_config(model_config, *sizes))


if __name__ == "__main__":
    main()
