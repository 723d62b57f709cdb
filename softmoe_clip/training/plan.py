"""What a run would cost, before it starts: parameters, memory and time, the last two from a few real steps."""

import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter

import torch

from softmoe_clip.config import TrainConfig
from softmoe_clip.data_pipelines.mixture import Mixture
from softmoe_clip.models.store import without_downloads
from softmoe_clip.models.summary import FLOAT32, as_size, counted
from softmoe_clip.training.branch import branch_off
from softmoe_clip.training.build import check_picture
from softmoe_clip.training.distributed import make_accelerator
from softmoe_clip.training.expert_parallel import average_expert_gradients, check_spread
from softmoe_clip.training.freeze import in_words, train_mode
from softmoe_clip.training.setup import Setup, make_batches, make_stepper, set_up
from softmoe_clip.training.shares import largest_shares, sharings

WARM_STEPS, TIMED_STEPS = 1, 3

Rows = Iterator[tuple[str, str]]


def print_plan(config: TrainConfig) -> None:
    """Print a table of what the run would take on the processes that are here; nothing is written.

    A single process measures its steps with all of the model, also where the config shares it out over several.
    """
    from rich.console import Console
    from rich.table import Table

    accelerator = make_accelerator(config.precision)
    num_processes = accelerator.num_processes
    here = replace(config, expert_parallel=1, sharding="none") if num_processes == 1 else config
    setup = set_up(here, accelerator)
    check_spread(setup.towers, config.expert_parallel)
    rows = [*model_rows(config, setup), *memory_rows(config, setup, num_processes)]
    branched = branch_off(here, setup.towers, setup.optimizer, setup.ema, accelerator.scaler, tell=lambda text: None)
    check_picture(setup.picture, setup.loaded, setup.shards)
    num_steps = config.last_step - (branched.step if branched is not None else 0)
    seconds, memory = timed_steps(here, setup, accelerator)
    rows += [("peak memory of a step", as_size(memory)), *time_rows(config, setup, seconds, num_steps)]
    if accelerator.is_main_process:
        table = Table("plan", f"{num_processes} process(es) on {accelerator.device}")
        table.columns[1].justify = "right"
        for row in rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 100).print(table)


def model_rows(config: TrainConfig, setup: Setup) -> Rows:
    """Say how large the model is, and how much of it is trained."""
    _, image, text = counted(without_downloads(setup.loaded.config), config.model.arch)
    numbers = largest_shares(setup.towers, config, 1)
    trained = sum(numbers[name] for name, p in setup.towers.named_parameters() if p.requires_grad)
    yield "image tower, parameters", f"{image.num_parameters:,}"
    yield "text tower, parameters", f"{text.num_parameters:,}"
    yield "all, trained", f"{sum(numbers.values()):,}, {trained:,}"
    if config.freeze or config.lora is not None:
        yield "trained", in_words(setup.towers).replace(", ", "\n")
    yield "forward GFLOP per pair", f"{(image.flops + text.flops) / 1e9:.2f}"


def memory_rows(config: TrainConfig, setup: Setup, num_processes: int) -> Rows:
    """Say what stays in memory from step to step: as a whole, and in each process where it is shared out."""
    adamw, averaged = config.optim.name == "adamw", config.ema is not None
    kept = "weights, gradients" + ", AdamW" * adamw + ", averages" * averaged
    copies = {
        name: 2 + 2 * adamw + averaged if parameter.requires_grad else 1
        for name, parameter in setup.towers.named_parameters()
    }
    places = {kept: 1} | {f"  {where}": number for where, number in sharings(config, num_processes).items()}
    for where, number in places.items():
        held = largest_shares(setup.towers, config, number)
        yield where, as_size(FLOAT32 * sum(copies[name] * held[name] for name in held))


def time_rows(config: TrainConfig, setup: Setup, seconds: float, num_steps: int) -> Rows:
    """Say what is seen of the data, how well it is mixed, and how long that takes, given the seconds of a step."""
    shards, pairs = setup.shards, num_steps * config.batch_size
    if len(shards):
        yield "data", f"{len(shards):,} pairs, seen {pairs / len(shards):.1f} times"
        mixture = Mixture.of(config.seed, shards.counts, shards.sources, config.data.window)
        yield "shards in a batch", f"{mixture.mixing(config.batch_size):.1f} x a full shuffle's variance"
    yield "steps x batch", f"{num_steps:,} x {config.batch_size:,}"
    yield "pairs per second", f"{config.batch_size / seconds:,.0f}"
    yield "expected time", duration(seconds * num_steps)


def timed_steps(config: TrainConfig, setup: Setup, accelerator) -> tuple[float, int]:
    """Return the median seconds of real steps, loading included, and the peak memory in bytes."""
    stepper, optimizer = make_stepper(config, setup, accelerator)
    loss = stepper.loss_function
    train_mode(stepper.model)
    times = []
    begin = perf_counter()
    for batch in make_batches(config, setup, accelerator, 0, WARM_STEPS + TIMED_STEPS):
        if setup.teacher is not None:
            with accelerator.autocast():
                stepper = replace(stepper, loss_function=setup.teacher.added_to(loss, batch))
        stepper.forward_backward(batch)
        average_expert_gradients(setup.towers, setup.mesh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - begin)
        begin = perf_counter()
    return statistics.median(times[WARM_STEPS:]), peak_memory(accelerator.device)


def peak_memory(device: torch.device) -> int:
    """Return the most memory held so far: of the GPU, or of this process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    """Write seconds as people say them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
