"""What a run would cost, before it starts: parameters, memory and time, the last two from a few real steps."""

import statistics
import sys
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import nn

from softmoe_clip.config import TrainConfig
from softmoe_clip.data_pipelines.mixture import Mixture
from softmoe_clip.data_pipelines.pictures import Picture
from softmoe_clip.data_pipelines.stream import Stream
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.train_set import batches_of, open_train
from softmoe_clip.models.complexity import image_complexity, num_parameters, text_complexity
from softmoe_clip.moe.experts import Experts
from softmoe_clip.training.build import build, run_picture, run_towers
from softmoe_clip.training.distill import load_teacher
from softmoe_clip.training.execution import set_execution
from softmoe_clip.training.freeze import in_words, train_mode
from softmoe_clip.training.lora import without_adapters
from softmoe_clip.training.losses import LOSSES
from softmoe_clip.training.masks import draw_by_position
from softmoe_clip.training.optim import make_optimizer, schedule
from softmoe_clip.training.step import Stepper, check_chunk_size

WARM_STEPS, TIMED_STEPS = 1, 3


def print_plan(config: TrainConfig) -> None:
    """Print a table of what the run would take on this machine, in one process; nothing is written."""
    from rich.console import Console
    from rich.table import Table

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shards = open_train(config.data)
    schedule(config.optim, config.last_step)  # refuses here what training would refuse
    loaded = build(config)
    model = loaded.model
    with without_adapters(model):  # peft's layers cannot be counted on the meta device, and are small
        image = image_complexity(model.visual, loaded.image_size)
        text = text_complexity(model.text, loaded.tokenizer.context_length)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    picture = run_picture(config, loaded, shards)
    seconds, memory = timed_steps(config, loaded, shards, picture, device)
    pairs = config.last_step * config.batch_size

    table = Table("plan", "")
    table.columns[1].justify = "right"
    table.add_row("image tower, parameters", f"{image.num_parameters:,}")
    table.add_row("text tower, parameters", f"{text.num_parameters:,}")
    table.add_row("all, trained", f"{num_parameters(model):,}, {trained:,}")
    if config.freeze or config.lora is not None:
        table.add_row("trained", in_words(model).replace(", ", "\n"))
    table.add_row("forward GFLOP per pair", f"{(image.flops + text.flops) / 1e9:.2f}")
    if config.optim.name == "adamw":
        table.add_row("weights, gradients, AdamW", f"{16 * trained / 2**30:.2f} GiB")
    else:
        table.add_row("weights and gradients", f"{8 * trained / 2**30:.2f} GiB")
    if config.expert_parallel > 1:
        share = 1 - 1 / config.expert_parallel
        held = trained - share * sum(p.numel() for p in expert_parameters(model) if p.requires_grad)
        table.add_row(f"the same with experts spread over {config.expert_parallel}", f"{16 * held / 2**30:.2f} GiB")
    if config.ema is not None:
        table.add_row("averaged weights", f"{4 * trained / 2**30:.2f} GiB")
    table.add_row(f"peak memory of a step on {device}", f"{memory / 2**30:.2f} GiB")
    if len(shards):
        table.add_row("data", f"{len(shards):,} pairs, seen {pairs / len(shards):.1f} times")
        mixture = Mixture.of(config.seed, shards.counts, shards.sources, config.data.window)
        table.add_row("shards in a batch", f"{mixture.mixing(config.batch_size):.1f} x a full shuffle's variance")
    table.add_row("steps x batch", f"{config.last_step:,} x {config.batch_size:,}")
    table.add_row("pairs per second", f"{config.batch_size / seconds:,.0f}")
    table.add_row("expected time", duration(seconds * config.last_step))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def timed_steps(
    config: TrainConfig, loaded, shards: ShardSet | Stream, picture: Picture, device: torch.device
) -> tuple[float, int]:
    """Return the median seconds of real steps, loading included, and the peak memory in bytes."""
    check_chunk_size(config.chunk_size, loaded.model)
    draw_by_position(loaded.model)
    set_execution(loaded.model, config)
    towers = loaded.model.to(device)
    model = run_towers(config, towers)
    train_mode(model)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.precision != "float32")
    model.forward = autocast()(model.forward)
    loss = LOSSES[config.loss]
    settings = config.seed, config.duplicates, config.chunk_size
    stepper = Stepper(model, towers, loss, loaded.preprocess_cfg, device, *settings)
    optimizer = make_optimizer(towers, config.optim)
    teacher = load_teacher(config, loaded.preprocess_cfg, device)
    batches = batches_of(shards)(
        shards,
        loaded.tokenizer,
        picture=picture,
        batch_size=config.batch_size,
        seed=config.seed,
        num_batches=WARM_STEPS + TIMED_STEPS,
        num_workers=config.data.num_workers,
        window=config.data.window,
    )
    times = []
    begin = perf_counter()
    for batch in batches:
        if teacher is not None:
            with autocast():
                stepper = replace(stepper, loss_function=teacher.added_to(loss, batch))
        stepper.forward_backward(batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - begin)
        begin = perf_counter()
    return statistics.median(times[WARM_STEPS:]), peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Return the most memory held so far: of the GPU, or of this process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that `expert_parallel` spreads over processes."""
    return [p for module in model.modules() if isinstance(module, Experts) for p in module.parameters()]


def duration(seconds: float) -> str:
    """Write seconds as people say them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
