"""The training loop: read it from top to bottom. What happens now and then stands where it happens."""

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from softmoe_clip.config import TrainConfig
from softmoe_clip.data_pipelines.ledger import append_replaced, cut_back_ledger, read_ledger
from softmoe_clip.data_pipelines.progress import progress, quietly
from softmoe_clip.data_pipelines.train_set import batches_of, open_train, statement
from softmoe_clip.data_pipelines.transforms import normalise
from softmoe_clip.models.store import save
from softmoe_clip.moe.stats import collect_routing
from softmoe_clip.training.build import build, run_picture, run_towers
from softmoe_clip.training.checkpoint import Progress, load_newest, save_checkpoint, whole_state
from softmoe_clip.training.distributed import any_process, make_accelerator, over_processes
from softmoe_clip.training.expert_parallel import (
    average_expert_gradients,
    check_spread,
    clip_gradients,
    kept_out_of_ddp,
    make_mesh,
    told_of_spread,
)
from softmoe_clip.training.freeze import in_words, train_mode, trained_names
from softmoe_clip.training.lora import merged_weights
from softmoe_clip.training.losses import LOSSES
from softmoe_clip.training.measure import check_measured, measure
from softmoe_clip.training.optim import adamw, schedule
from softmoe_clip.training.run_folder import begin, is_finished, newest_step, say
from softmoe_clip.training.run_log import RunLog

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp; siglip is left free


class Stopped(Exception):
    """The run was asked to stop, has saved its state, and goes on when it is started again."""


def train(config: TrainConfig) -> Path:
    """Train, or go on exactly where the run in `config.out` stopped, and return the run folder.

    Raises Stopped after Ctrl-C or SIGTERM, once the state is saved; ValueError when the loss is not finite.
    """
    run = Path(config.out)
    if is_finished(run, config):
        say(f"{run} is finished ({newest_step(run)} steps); nothing to do. Its model is {run / 'model'}.")
        return run

    accelerator = make_accelerator(config.precision)
    device, is_main = accelerator.device, accelerator.is_main_process
    shards = open_train(config.data)
    check_measured(config)
    image_moe = config.model.image_moe
    check_batch_size(config.batch_size, accelerator.num_processes, image_moe.group_size if image_moe else 1)
    learning_rate = schedule(config.optim, config.last_step)
    mesh = make_mesh(config.expert_parallel, accelerator.num_processes, device)
    loaded = build(config, None if mesh is None else mesh.row)
    check_spread(loaded.model, mesh)
    picture = run_picture(config, loaded, shards)
    towers = loaded.model.to(device)
    optimizer = adamw(towers, config.optim)
    if is_main:  # the folder is begun only now: a mistake in the config must not leave one behind
        begin(run, config, shards)
        (run / "trained_parameters.txt").write_text("".join(f"{name}\n" for name in trained_names(towers)))
    accelerator.wait_for_everyone()
    done = load_newest(run / "checkpoints", towers, optimizer, warn=say)
    model, optimizer = accelerator.prepare(kept_out_of_ddp(run_towers(config, towers)), optimizer)
    loss_function = LOSSES[config.loss]
    log = RunLog(run, done.step) if is_main else nullcontext()
    ledger, num_replaced = run / "skipped.jsonl", 0
    if is_main:
        cut_back_ledger(ledger, done.step)
        num_replaced = len(read_ledger(ledger))
        pairs = f"{len(shards):,}" if len(shards) else "streamed"
        say(f"{accelerator.num_processes} process(es) on {device}, {pairs} pairs, batch {config.batch_size}")
        for line in (*statement(shards), *told_of_spread(towers, mesh)):
            say(line)
        if config.freeze or config.lora is not None:
            say(f"trained parameters: {in_words(towers)}")
        if done.step:
            say(f"going on after step {done.step} of {config.last_step}")

    def checkpoint() -> None:
        accelerator.wait_for_everyone()
        whole = whole_state(towers, optimizer, mesh)
        if is_main:
            # Before the checkpoint: a finished run, told by its last one, has its model.
            save(loaded, run / "model", whole.weights if whole else merged_weights(towers))
            save_checkpoint(run / "checkpoints", towers, optimizer, done, config.keep_last, whole)
        accelerator.wait_for_everyone()

    accelerator.wait_for_everyone()
    preprocess = loaded.preprocess_cfg
    batches = batches_of(shards)(
        shards,
        loaded.tokenizer,
        picture=picture,
        batch_size=config.batch_size,
        seed=config.seed,
        start=done.samples_seen,
        num_batches=config.last_step - done.step,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=config.data.num_workers,
        caption=config.data.caption,
        shuffle_captions=config.data.shuffle_captions,
        window=config.data.window,
    )
    bar = progress("training", total=config.last_step, unit="steps", already=done.step) if is_main else nullcontext()
    with log, stop_signals() as stop, bar as advance:
        train_mode(model)
        since, pairs_since = perf_counter(), 0
        for batch in batches:
            step = done.step + 1
            reports = every(config.log_every, step, config.last_step)
            seed_step(config.seed, step, accelerator.process_index)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done.step)

            with collect_routing(statistics=reports) as routing:
                images = normalise(batch.images.to(device, non_blocking=True), preprocess["mean"], preprocess["std"])
                out = model(images, batch.token_ids.to(device, non_blocking=True))
            loss = loss_function(
                out["image_features"].float(), out["text_features"].float(), out["logit_scale"], out.get("logit_bias")
            )
            aux_loss = routing.aux_loss().to(loss)
            loss_value, aux_value = over_processes(torch.stack([loss, aux_loss]), "mean").tolist()
            check_finite("loss", loss_value + aux_value, step, batch.keys)
            accelerator.backward(loss + aux_loss)
            average_expert_gradients(towers, mesh)
            gradient_norm = clip_gradients(towers, accelerator, config.optim.clip_norm, mesh)
            if config.precision != "fp16":  # there Accelerate skips such a step and lowers its loss scale
                check_finite("gradient norm", float(gradient_norm), step, batch.keys)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if config.loss == "clip":
                with torch.no_grad():
                    towers.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

            done = Progress(step, done.samples_seen + config.batch_size)
            pairs_since += config.batch_size
            stopping = any_process(bool(stop), device)
            is_last = step == config.last_step
            append_replaced(ledger, batch.replaced, step)
            num_replaced += len(batch.replaced)
            if is_main:
                advance(1, note=f"loss {loss_value:.3f}")
            if reports:
                replaced = int(over_processes(torch.tensor(num_replaced, device=device), "sum"))
            if is_main and reports:
                numbers = {
                    "samples_seen": done.samples_seen,
                    "loss": loss_value,
                    **({"aux_loss": aux_value} if routing.losses else {}),
                    "lr": learning_rate(step - 1),
                    "logit_scale": towers.logit_scale.exp().item(),
                    "gradient_norm": float(gradient_norm),
                    "pairs_per_second": pairs_since / (perf_counter() - since),
                    "replaced": replaced,
                    **routing.summary(),
                }
                log.write(step, numbers)
                since, pairs_since = perf_counter(), 0
            if every(config.eval.every, step, config.last_step) and not stopping:
                if is_main or (mesh is not None and mesh.with_main):  # who has a part of the experts must take part
                    with nullcontext() if is_main else quietly():
                        numbers = measure(loaded, config, run, step, device, writes=is_main)
                if is_main:
                    if numbers:
                        log.write(step, numbers)
                    if "val/loss" in numbers:
                        say(f"step {step}: val/loss {numbers['val/loss']:.3f}")
                accelerator.wait_for_everyone()
                train_mode(model)
                since, pairs_since = perf_counter(), 0
            if stopping or every(config.checkpoint_every, step, config.last_step):
                checkpoint()
            if stopping and not is_last:
                raise Stopped(f"stopped after step {step} of {config.last_step}; start the same command again to go on")
    if is_main:
        say(f"trained {config.last_step} steps; the model is {run / 'model'}")
    return run


def every(interval: int, step: int, last_step: int) -> bool:
    """Return True each `interval` steps and on the last one; an interval of 0 means only the last."""
    return step == last_step or (interval > 0 and step % interval == 0)


def check_batch_size(batch_size: int, num_processes: int, group_size: int = 1) -> None:
    """Refuse a global batch that the processes cannot share equally, or that does not hold whole routing groups."""
    if batch_size % num_processes:
        raise ValueError(f"batch_size {batch_size} is global and must divide by the {num_processes} processes")
    if batch_size // num_processes % group_size:
        raise ValueError(
            f"each of the {num_processes} processes gets {batch_size // num_processes} images, which do not divide "
            f"into routing groups of {group_size}: change batch_size or group_size"
        )


def check_finite(what: str, value: float, step: int, keys: list[str]) -> None:
    """Stop before weights that are no numbers reach a checkpoint."""
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value} at step {step}, sample keys {' '.join(keys)}: lower optim.lr")


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout and the like a function of (seed, step, process), so that a resumed run draws the same."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM instead of dying of them; a second Ctrl-C stops at once."""
    received: list[int] = []

    def receive(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
