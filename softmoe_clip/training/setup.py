"""What the steps of a run are made with, from data to optimizer: training and its plan begin the same way."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from softmoe_clip.config import TrainConfig
from softmoe_clip.data_pipelines.pictures import Picture
from softmoe_clip.data_pipelines.stream import Stream
from softmoe_clip.data_pipelines.tar_index import ShardSet
from softmoe_clip.data_pipelines.train_set import batches_of, open_train
from softmoe_clip.models.store import LoadedModel
from softmoe_clip.training.build import build, run_picture, run_towers
from softmoe_clip.training.distill import Teacher, load_teacher
from softmoe_clip.training.ema import Ema
from softmoe_clip.training.execution import set_execution
from softmoe_clip.training.expert_parallel import Mesh, check_spread, kept_out_of_ddp, make_mesh
from softmoe_clip.training.losses import LOSSES
from softmoe_clip.training.masks import draw_by_position
from softmoe_clip.training.measure import check_measured
from softmoe_clip.training.optim import Schedule, make_optimizer, schedule
from softmoe_clip.training.sharding import UnderAutocast, is_sharded, shard
from softmoe_clip.training.step import Stepper, check_chunk_size
from softmoe_clip.training.trackers import check_trackers


class Setup(NamedTuple):
    """Data, model and what trains it, as they are at step 0; `towers` is the model of `loaded`, on the run's device."""

    shards: ShardSet | Stream
    learning_rate: Schedule
    mesh: Mesh | None
    loaded: LoadedModel
    picture: Picture
    turned_off: list[str]  # what of the model's dropout could not be drawn by position, in words
    towers: nn.Module
    optimizer: Any
    teacher: Teacher | None
    ema: Ema | None


def set_up(config: TrainConfig, accelerator, begun: Path | None = None) -> Setup:
    """Open the data and build the model and all that trains it; nothing is written. `begun` is as in `build`.

    Raises ValueError, one sentence, where config, data, model and number of processes do not go together.
    """
    device, num_processes = accelerator.device, accelerator.num_processes
    shards = open_train(config.data)
    check_measured(config)
    check_trackers(config.trackers)
    image_moe = config.model.image_moe
    check_batch_size(config.batch_size, num_processes, image_moe.group_size if image_moe else 1)
    learning_rate = schedule(config.optim, config.last_step)
    mesh = make_mesh(config.expert_parallel, num_processes)
    loaded = build(config, None if mesh is None else mesh.row, begun)
    check_spread(loaded.model, config.expert_parallel)
    picture = run_picture(config, loaded, shards)
    check_chunk_size(config.chunk_size, loaded.model)
    turned_off = draw_by_position(loaded.model)
    set_execution(loaded.model, config)
    shard(loaded.model, config, num_processes, device)  # before: no device need hold all of it
    towers = loaded.model.to(device)
    optimizer = make_optimizer(towers, config.optim)
    teacher = load_teacher(config, loaded.preprocess_cfg, device)
    ema = Ema(towers, config.ema) if config.ema is not None else None
    return Setup(shards, learning_rate, mesh, loaded, picture, turned_off, towers, optimizer, teacher, ema)


def make_stepper(config: TrainConfig, setup: Setup, accelerator) -> tuple[Stepper, Any]:
    """Let Accelerate prepare model and optimizer; return what makes steps with the model, and the optimizer."""
    towers = setup.towers
    sharded = is_sharded(towers)
    if sharded:  # Accelerate, which would spread what it prepares itself, does not see the model
        model = UnderAutocast(towers, accelerator.autocast)
    else:
        model = accelerator.prepare(kept_out_of_ddp(run_towers(config, towers)))
    # Its state is where it should be: counters that `step` reads on the CPU must not go to the GPU.
    optimizer = accelerator.prepare_optimizer(setup.optimizer, device_placement=False)
    stepper = Stepper(
        model,
        towers,
        LOSSES[config.loss],
        setup.loaded.preprocess_cfg,
        accelerator.device,
        config.seed,
        config.duplicates,
        config.chunk_size,
        accelerator.backward,
        nullcontext if sharded else partial(accelerator.no_sync, model),  # whole gradients are not to be kept
    )
    return stepper, optimizer


def make_batches(config: TrainConfig, setup: Setup, accelerator, start: int, num_batches: int):
    """Return this process's part of so many global batches, from a position on."""
    return batches_of(setup.shards)(
        setup.shards,
        setup.loaded.tokenizer,
        picture=setup.picture,
        batch_size=config.batch_size,
        seed=config.seed,
        start=start,
        num_batches=num_batches,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=config.data.num_workers,
        caption=config.data.caption,
        shuffle_captions=config.data.shuffle_captions,
        window=config.data.window,
    )


def check_batch_size(batch_size: int, num_processes: int, group_size: int = 1) -> None:
    """Refuse a global batch that the processes cannot share equally, or that does not hold whole routing groups."""
    if batch_size % num_processes:
        raise ValueError(f"batch_size {batch_size} is global and must divide by the {num_processes} processes")
    if batch_size // num_processes % group_size:
        raise ValueError(
            f"each of the {num_processes} processes gets {batch_size // num_processes} images, which do not divide "
            f"into routing groups of {group_size}: change batch_size or group_size"
        )
