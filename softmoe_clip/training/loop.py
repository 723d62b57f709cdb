"""The training loop: read it from top to bottom. What happens now and then stands where it happens."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from time import perf_counter

import torch

from softmoe_clip.config import TrainConfig
from softmoe_clip.data_pipelines.ledger import append_replaced, cut_back_ledger, read_ledger
from softmoe_clip.data_pipelines.progress import progress, quietly
from softmoe_clip.data_pipelines.train_set import batches_of, open_train, statement
from softmoe_clip.models.store import save
from softmoe_clip.training.branch import branch_off
from softmoe_clip.training.build import build, run_picture, run_towers
from softmoe_clip.training.checkpoint import Progress, load_newest, save_checkpoint, shared_state, whole_weights
from softmoe_clip.training.distill import load_teacher
from softmoe_clip.training.distributed import check_same_everywhere, gather_objects, make_accelerator, over_processes
from softmoe_clip.training.ema import Ema
from softmoe_clip.training.execution import set_execution
from softmoe_clip.training.expert_parallel import (
    average_expert_gradients,
    check_spread,
    kept_out_of_ddp,
    make_mesh,
    told_of_spread,
)
from softmoe_clip.training.freeze import in_words, train_mode, trained_names
from softmoe_clip.training.guards import GradientNorms, gradient_norms, must_stop, not_finite
from softmoe_clip.training.losses import LOSSES
from softmoe_clip.training.masks import draw_by_position
from softmoe_clip.training.measure import check_measured, measure
from softmoe_clip.training.optim import make_optimizer, schedule
from softmoe_clip.training.rates import rate_lines
from softmoe_clip.training.remote_run import run_at
from softmoe_clip.training.routing_watch import RoutingWatch, watched_layers
from softmoe_clip.training.run_folder import Stopped, as_tree, begin, is_finished, newest_step, say
from softmoe_clip.training.run_log import RunLog
from softmoe_clip.training.sharding import (
    UnderAutocast,
    average_scalar_gradients,
    clip_gradients,
    is_sharded,
    shard,
    told_of_shards,
)
from softmoe_clip.training.step import Stepper, check_chunk_size
from softmoe_clip.training.stop_signals import stop_signals
from softmoe_clip.training.trackers import check_trackers

MAX_LOGIT_SCALE = math.log(100)  # CLIP's clamp; siglip is left free


def train(config: TrainConfig) -> Path:
    """Train, or go on exactly where the run in `config.out` stopped, and return the run folder.

    Raises Stopped after Ctrl-C or SIGTERM, once the state is saved; ValueError when the loss is not finite.
    """
    place = run_at(config)
    run = place.folder
    accelerator = make_accelerator(config.precision)
    device, is_main = accelerator.device, accelerator.is_main_process
    with accelerator.main_process_first():  # what only the main process's machine has must be uploaded before
        if accelerator.is_local_main_process:
            place.fetch()
    accelerator.wait_for_everyone()  # until the other machines have fetched it too
    if over_processes(torch.tensor(float(is_finished(run, config)), device=device), "mean") == 1:  # nobody leaves alone
        if is_main:
            say(f"{place} is finished ({newest_step(run)} steps); nothing to do. Its model is {place}/model.")
        return run

    shards = open_train(config.data)
    check_measured(config)
    check_trackers(config.trackers)
    image_moe = config.model.image_moe
    check_batch_size(config.batch_size, accelerator.num_processes, image_moe.group_size if image_moe else 1)
    learning_rate = schedule(config.optim, config.last_step)
    mesh = make_mesh(config.expert_parallel, accelerator.num_processes, device)
    loaded = build(config, None if mesh is None else mesh.row)
    check_spread(loaded.model, mesh)
    picture = run_picture(config, loaded, shards)
    check_chunk_size(config.chunk_size, loaded.model)
    turned_off = draw_by_position(loaded.model)
    set_execution(loaded.model, config)
    shard(loaded.model, config, accelerator.num_processes, device)  # before: no device need hold all of it
    towers = loaded.model.to(device)
    optimizer = make_optimizer(towers, config.optim)
    teacher = load_teacher(config, loaded.preprocess_cfg, device)
    ema = Ema(towers, config.ema) if config.ema is not None else None
    branched = branch_off(config, towers, optimizer, ema) if newest_step(run) == 0 else None
    if is_main:  # the folder is begun only now: a mistake in the config must not leave one behind
        begin(run, config, shards)
        (run / "trained_parameters.txt").write_text("".join(f"{name}\n" for name in trained_names(towers)))
        if any(group["lr_scale"] != 1 for group in optimizer.param_groups):
            (run / "parameter_rates.tsv").write_text("".join(f"{line}\n" for line in rate_lines(towers, optimizer)))
    accelerator.wait_for_everyone()
    warn = say if is_main else lambda text: None
    done = load_newest(run / "checkpoints", towers, optimizer, warn, ema)
    check_same_everywhere("the step of the newest checkpoint", done.step, device)
    if is_main:
        place.upload(done.step)  # now, not hours later, it shows whether that can be done
    done = branched if branched is not None and not done.step else done
    sharded = is_sharded(towers)
    if sharded:  # Accelerate, which would spread what it prepares itself, does not see the model
        model, optimizer = UnderAutocast(towers, accelerator.autocast), accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(kept_out_of_ddp(run_towers(config, towers)), optimizer)
    stepper = Stepper(
        model,
        towers,
        LOSSES[config.loss],
        loaded.preprocess_cfg,
        device,
        config.seed,
        config.duplicates,
        config.chunk_size,
        accelerator.backward,
        nullcontext if sharded else partial(accelerator.no_sync, model),  # whole gradients are not to be kept
    )
    log = RunLog(run, done.step, config.trackers, as_tree(config)) if is_main else nullcontext()
    watch = RoutingWatch(watched_layers(towers), config.optim.warmup, log.lines_before if is_main else ())
    ledger, num_replaced = run / "skipped.jsonl", 0
    if is_main:
        cut_back_ledger(ledger, done.step)
        num_replaced = len(read_ledger(ledger))
        pairs = f"{len(shards):,}" if len(shards) else "streamed"
        say(f"{accelerator.num_processes} process(es) on {device}, {pairs} pairs, batch {config.batch_size}")
        for line in (*statement(shards), *turned_off, *told_of_spread(towers, mesh), *told_of_shards(towers)):
            say(line)
        if config.freeze or config.lora is not None:
            say(f"trained parameters: {in_words(towers)}")
        if done.step:
            say(f"going on after step {done.step} of {config.last_step}")

    def checkpoint() -> None:
        accelerator.wait_for_everyone()
        # The model before the checkpoint: a finished run, told by its last one, has its model.
        save_model(run / "model")
        if ema is not None:
            with ema.in_place(towers):
                save_model(run / "model_ema")
        shared = shared_state(run / "checkpoints", towers, optimizer, done.step, ema, mesh)
        if is_main:
            kept = config.keep_last, config.keep_every
            save_checkpoint(run / "checkpoints", towers, optimizer, done, *kept, ema, shared)
            place.upload(done.step)
        accelerator.wait_for_everyone()

    def save_model(folder: Path) -> None:
        weights = whole_weights(towers, mesh, keep=is_main)
        if is_main:
            save(loaded, folder, weights)

    def broken(what: str, value: float, norms: GradientNorms | None = None) -> ValueError:
        numbers = {
            "samples_seen": done.samples_seen,
            "loss": loss_value,
            "aux_loss": aux_value,
            "lr": learning_rate(done.step),
            "logit_scale": towers.logit_scale.exp().item(),
        }
        by_itself = replace(stepper, model=accelerator.unwrap_model(model))  # DDP sends buffers in each forward pass
        again = None if sharded or mesh is not None else partial(by_itself.embed_all, batch)
        return not_finite(
            what, value, run=run, step=step, batch=batch, towers=towers, again=again, numbers=numbers, norms=norms
        )

    accelerator.wait_for_everyone()
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
    with place.to_the_end() if is_main else nullcontext(), log, stop_signals() as stop, bar as advance:
        train_mode(model)
        since, pairs_since = perf_counter(), 0
        begun = since - (log.seconds_before() if is_main else 0.0)  # so that `seconds` goes on, too
        for batch in batches:
            step = done.step + 1
            reports = every(config.log_every, step, config.last_step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done.step) * group["lr_scale"]
            if teacher is not None:
                with accelerator.autocast():
                    stepper = replace(stepper, loss_function=teacher.added_to(LOSSES[config.loss], batch))

            loss, aux_loss, routing = stepper.forward_backward(batch, statistics=reports)
            loss_value, aux_value = over_processes(torch.stack([loss, aux_loss]), "mean").tolist()
            if not math.isfinite(loss_value + aux_value):
                raise broken("loss", loss_value + aux_value)
            accelerator.unscale_gradients()
            average_expert_gradients(towers, mesh)
            average_scalar_gradients(towers)
            norms = gradient_norms(towers, mesh)
            if must_stop(norms.total.item(), accelerator):
                raise broken("gradient norm", norms.total.item(), norms)
            clip_gradients(towers, config.optim.clip_norm, norms.total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if config.loss == "clip":
                with torch.no_grad():
                    towers.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            if ema is not None:
                ema.update(towers, step)

            done = Progress(step, done.samples_seen + config.batch_size)
            pairs_since += config.batch_size
            mine = torch.tensor([bool(stop), len(batch.replaced)], device=device)
            stopping, num_new = over_processes(mine, "sum").tolist()
            is_last = step == config.last_step
            replaced = sorted(chain(*gather_objects(batch.replaced))) if num_new else []
            num_replaced += num_new
            if is_main:
                append_replaced(ledger, replaced, step)
                advance(1, note=f"loss {loss_value:.3f}")
            if teacher is not None and reports:
                distill_value = float(over_processes(stepper.loss_function.distill_loss, "mean"))
            if is_main and reports:
                numbers = {
                    "samples_seen": done.samples_seen,
                    "loss": loss_value,
                    **({"aux_loss": aux_value} if routing.losses else {}),
                    **({"distill_loss": distill_value} if teacher is not None else {}),
                    "lr": learning_rate(step - 1),
                    "logit_scale": towers.logit_scale.exp().item(),
                    **norms.by_tower(),
                    "seconds": perf_counter() - begun,
                    "pairs_per_second": pairs_since / (perf_counter() - since),
                    "replaced": num_replaced,
                    **routing.summary(),
                }
                log.write(step, numbers)
                for line in watch.changes(step, numbers):
                    say(line)
                since, pairs_since = perf_counter(), 0
            if every(config.eval.every, step, config.last_step) and (is_last or not stopping):
                measuring = perf_counter()
                if is_main or sharded or (mesh is not None and mesh.with_main):  # who holds a part must take part
                    averaged = ema.in_place(towers) if ema is not None else nullcontext()
                    with averaged, nullcontext() if is_main else quietly():
                        numbers = measure(loaded, config, run, step, device, writes=is_main)
                if is_main:
                    if numbers:
                        log.write(step, numbers)
                    if "val/loss" in numbers:
                        say(f"step {step}: val/loss {numbers['val/loss']:.3f}")
                accelerator.wait_for_everyone()
                train_mode(model)
                since, pairs_since = perf_counter(), 0
                begun += since - measuring
            if stopping or every(config.checkpoint_every, step, config.last_step):
                checkpoint()
            if stopping:
                break
    accelerator.wait_for_everyone()  # a launcher kills the others when the first one leaves: the main one still wrote
    if done.step < config.last_step:
        stopped = f"stopped after step {done.step} of {config.last_step}; start the same command again to go on"
        if is_main:
            say(stopped)
        raise Stopped(stopped)
    if is_main:
        say(f"trained {config.last_step} steps; the model is {place}/model")
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
