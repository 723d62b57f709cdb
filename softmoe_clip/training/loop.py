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
from softmoe_clip.data_pipelines.train_set import statement
from softmoe_clip.models.create import preprocessing_of
from softmoe_clip.models.store import save
from softmoe_clip.training.branch import branch_off
from softmoe_clip.training.build import check_picture
from softmoe_clip.training.checkpoint import Progress, load_newest, save_checkpoint, shared_state, whole_weights
from softmoe_clip.training.distributed import (
    any_process,
    check_same_everywhere,
    gather_objects,
    make_accelerator,
    over_processes,
)
from softmoe_clip.training.expert_parallel import average_expert_gradients, told_of_spread
from softmoe_clip.training.freeze import in_words, train_mode, trained_names
from softmoe_clip.training.guards import GradientNorms, gradient_norms, must_stop, not_finite
from softmoe_clip.training.losses import LOSSES
from softmoe_clip.training.measure import measure
from softmoe_clip.training.rates import rate_lines
from softmoe_clip.training.remote_run import run_at
from softmoe_clip.training.routing_watch import RoutingWatch, watched_layers
from softmoe_clip.training.run_folder import Stopped, as_tree, begin, is_finished, newest_step, say
from softmoe_clip.training.run_log import RunLog
from softmoe_clip.training.setup import make_batches, make_stepper, set_up
from softmoe_clip.training.sharding import average_scalar_gradients, clip_gradients, is_sharded, told_of_shards
from softmoe_clip.training.stop_signals import stop_signals

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
    if not any_process(not is_finished(run, config), device):  # all or none: nobody may wait for who has left
        if is_main:
            say(f"{place} is finished ({newest_step(run)} steps); nothing to do. Its model is {place}/model.")
        return run

    setup = set_up(config, accelerator, begun=run if newest_step(run) > 0 else None)
    shards, loaded, towers, mesh = setup.shards, setup.loaded, setup.towers, setup.mesh
    optimizer, teacher, ema = setup.optimizer, setup.teacher, setup.ema
    scaler = accelerator.scaler  # of fp16 alone
    warn = say if is_main else lambda text: None
    branched, lock = None, nullcontext()
    if newest_step(run) == 0:  # a run that goes on has the features that it began with: `begin` compares the files
        branched = branch_off(config, towers, optimizer, ema, scaler, warn)
        check_picture(setup.picture, loaded, shards)
    if is_main:  # the folder is begun only now: a mistake in the config must not leave one behind
        lock = begin(run, config, shards, preprocessing_of(towers))
        (run / "trained_parameters.txt").write_text("".join(f"{name}\n" for name in trained_names(towers)))
        if any(group["lr_scale"] != 1 for group in optimizer.param_groups):
            (run / "parameter_rates.tsv").write_text("".join(f"{line}\n" for line in rate_lines(towers, optimizer)))
    accelerator.wait_for_everyone()
    done = load_newest(run / "checkpoints", towers, optimizer, warn, ema, scaler)
    check_same_everywhere("the step of the newest checkpoint", done.step, device)
    if is_main:
        place.upload(done.step)  # now, not hours later, it shows whether that can be done
    to_measure = done.step > 0 and every(config.eval.every, done.step, config.last_step)
    done = branched if branched is not None and not done.step else done
    stepper, optimizer = make_stepper(config, setup, accelerator)
    log = RunLog(run, done.step, config.trackers, as_tree(config)) if is_main else nullcontext()
    watch = RoutingWatch(watched_layers(towers), config.optim.warmup, log.lines_before if is_main else ())
    ledger, num_replaced = run / "skipped.jsonl", 0
    if is_main:
        cut_back_ledger(ledger, done.step)
        num_replaced = len(read_ledger(ledger))
        pairs = f"{len(shards):,}" if len(shards) else "streamed"
        say(f"{accelerator.num_processes} process(es) on {device}, {pairs} pairs, batch {config.batch_size}")
        for line in (*statement(shards), *setup.turned_off, *told_of_spread(towers, mesh), *told_of_shards(towers)):
            say(line)
        if config.freeze or config.lora is not None:
            say(f"trained parameters: {in_words(towers)}")
        if done.step:
            say(f"going on after step {done.step} of {config.last_step}")

    def checkpoint() -> None:
        accelerator.wait_for_everyone()
        save_models()  # before the checkpoint: a finished run, told by its last one, has them
        shared = shared_state(run / "checkpoints", towers, optimizer, done.step, ema, mesh)
        if is_main:
            kept = config.keep_last, config.keep_every
            save_checkpoint(run / "checkpoints", towers, optimizer, done, *kept, ema, shared, scaler)
            place.upload(done.step)
        accelerator.wait_for_everyone()

    def save_models() -> None:
        save_model(run / "model")
        if ema is not None:
            with ema.in_place(towers):
                save_model(run / "model_ema")

    def save_model(folder: Path) -> None:
        weights = whole_weights(towers, mesh, keep=is_main)
        if is_main:
            save(loaded, folder, weights)

    def evaluate() -> None:
        if is_main or is_sharded(towers) or (mesh is not None and mesh.with_main):  # who holds a part must take part
            averaged = ema.in_place(towers) if ema is not None else nullcontext()
            with averaged, nullcontext() if is_main else quietly():
                numbers = measure(loaded, config, run, done.step, device, writes=is_main)
        if is_main:
            if numbers:
                log.write(done.step, numbers)
            if "val/loss" in numbers:
                say(f"step {done.step}: val/loss {numbers['val/loss']:.3f}")
        accelerator.wait_for_everyone()
        train_mode(stepper.model)

    def broken(what: str, value: float, norms: GradientNorms | None = None) -> ValueError:
        numbers = {
            "samples_seen": done.samples_seen,
            "loss": loss_value,
            "aux_loss": aux_value,
            "lr": setup.learning_rate(done.step),
            "logit_scale": towers.logit_scale.exp().item(),
        }
        # Without DDP, which sends buffers in each forward pass.
        by_itself = replace(stepper, model=accelerator.unwrap_model(stepper.model))
        return not_finite(
            what,
            value,
            run=run,
            step=step,
            batch=batch,
            towers=towers,
            again=partial(by_itself.embed_all, batch),
            together=is_sharded(towers) or mesh is not None,
            numbers=numbers,
            norms=norms,
        )

    accelerator.wait_for_everyone()
    batches = make_batches(config, setup, accelerator, done.samples_seen, max(0, config.last_step - done.step))
    bar = progress("training", total=config.last_step, unit="steps", already=done.step) if is_main else nullcontext()
    with lock, place.to_the_end() if is_main else nullcontext(), log, stop_signals() as stop, bar as advance:
        train_mode(stepper.model)
        if to_measure and any_process(is_main and not log.has_measured(done.step), device):
            evaluate()  # what a stop after this step left out
        if done.step >= config.last_step:
            save_models()  # which somebody removed, else the run would be finished
        since, pairs_since = perf_counter(), 0
        begun = since - (log.seconds_before() if is_main else 0.0)  # so that `seconds` goes on, too
        for batch in batches:
            step = done.step + 1
            reports = every(config.log_every, step, config.last_step)
            for group in optimizer.param_groups:
                group["lr"] = setup.learning_rate(done.step) * group["lr_scale"]
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
            if reports:
                routing_numbers = routing.summary(partial(over_processes, reduce="mean"))
            if teacher is not None and reports:
                distill_value = float(over_processes(stepper.loss_function.distill_loss, "mean"))
            if is_main and reports:
                numbers = {
                    "samples_seen": done.samples_seen,
                    "loss": loss_value,
                    **({"aux_loss": aux_value} if routing.losses else {}),
                    **({"distill_loss": distill_value} if teacher is not None else {}),
                    "lr": setup.learning_rate(step - 1),
                    "logit_scale": towers.logit_scale.exp().item(),
                    **norms.by_tower(),
                    "seconds": perf_counter() - begun,
                    "pairs_per_second": pairs_since / (perf_counter() - since),
                    "replaced": num_replaced,
                    **routing_numbers,
                }
                log.write(step, numbers)
                for line in watch.changes(step, numbers):
                    say(line)
                since, pairs_since = perf_counter(), 0
            if every(config.eval.every, step, config.last_step) and (is_last or not stopping):
                measuring = perf_counter()
                evaluate()
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
        say(f"trained {done.step} steps; the model is {place}/model")
    return run


def every(interval: int, step: int, last_step: int) -> bool:
    """Return True each `interval` steps and on the last one; an interval of 0 means only the last."""
    return step == last_step or (interval > 0 and step % interval == 0)
