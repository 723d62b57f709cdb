"""Runs with masks and router noise end with the same weights: in chunks, over several processes, or stopped."""

import json
import os
import socket
from multiprocessing import get_context

import pytest
import torch
from conftest import TINY_ARCHITECTURE
from safetensors.torch import load_file

from softmoe_clip.config import TrainConfig
from softmoe_clip.data_pipelines.strict import load_strict

WEIGHTS = "model/open_clip_model.safetensors"
SECONDS = 300
# Router noise and patch dropout, or drop path and patch dropout of a timm tower with Soft MoE.
NOISY = {"router": "tokens_choice", "num_experts": 4, "noise_std": 2.0, "group_size": 2, "gshard_loss": 0.1}
TIMM = {
    "image_size": 64,
    "timm_model_name": "softmoe_vit_demo_patch8_64",
    "timm_pool": "avg",
    "timm_proj": "linear",
    "timm_drop": 0.1,
    "timm_drop_path": 0.3,
    "patch_dropout": 0.75,
}
VISION = {"siglip": TINY_ARCHITECTURE["vision_cfg"] | {"patch_dropout": 0.4}, "clip": TIMM}


@pytest.fixture
def config(tiny_settings, tmp_path):
    """Make the config of a run with masks; a larger eps, since Adam divides noise by itself where gradients are 0."""

    def make(name, loss, *overrides):
        architecture = tmp_path / f"{loss}.json"
        architecture.write_text(json.dumps(TINY_ARCHITECTURE | {"vision_cfg": VISION[loss]}))
        model = {"arch": str(architecture), "image_moe": NOISY if loss == "siglip" else None}
        settings = tiny_settings | {"out": str(tmp_path / name), "model": model, "loss": loss, "batch_size": 16}
        optim = ["optim.eps=0.0001", "optim.schedule=constant", "optim.warmup=0", "checkpoint_every=0"]
        return load_strict(TrainConfig, settings, [*optim, *overrides])

    return make


def weights(run):
    return load_file(f"{run}/{WEIGHTS}")


def metrics(run):
    with open(f"{run}/metrics.jsonl") as lines:
        return [json.loads(line) for line in lines]


def routing_of(run):
    """Name the statistics that a run logs of its routing."""
    return [name for name in metrics(run)[0] if name.startswith("routing/")]


def assert_same_run(found, expected, names=()):
    found_weights, others = weights(found), weights(expected)
    assert found_weights.keys() == others.keys()
    for name, weight in found_weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=2e-6, msg=f"{found}: {name}")
    for name in ("step", "loss", "gradient_norm", "logit_scale", *names):
        numbers = [torch.tensor([line[name] for line in metrics(run)]) for run in (found, expected)]
        torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-5, msg=f"{found}: {name}")


@pytest.mark.parametrize("loss", ["siglip", pytest.param("clip", marks=pytest.mark.slow)])
def test_a_run_with_masks_that_stops_goes_on_to_the_same_bits_and_in_chunks_to_the_same_weights(config, loss):
    from softmoe_clip.training.loop import train

    whole = train(config("whole", loss, "steps=4"))
    train(config("stopped", loss, "steps=2"))
    stopped = train(config("stopped", loss, "steps=4"))
    assert (stopped / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    train(config("changed", loss, "steps=2"))
    assert_same_run(train(config("changed", loss, "steps=4", "chunk_size=6")), whole)
    other = train(config("other", loss, "steps=4", "seed=1"))
    assert metrics(other)[0]["loss"] != metrics(whole)[0]["loss"]


def test_half_precision_can_be_chunked(config):
    from accelerate.state import AcceleratorState

    from softmoe_clip.training.loop import train

    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than that of the runs before
    try:
        whole, chunked = (
            metrics(train(config(name, "siglip", "precision=bf16", "steps=2", *cut)))
            for name, cut in (("whole", ()), ("chunked", ("chunk_size=6",)))
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for name in ("loss", "gradient_norm"):
        assert chunked[0][name] == pytest.approx(whole[0][name], rel=0.03)


def test_chunk_size_counts_pairs_from_one(config):
    with pytest.raises(ValueError, match="chunk_size counts pairs from 1, got 0: leave it out for no chunks"):
        config("run", "clip", "chunk_size=0")


def test_chunks_that_cut_routing_groups_are_refused_before_anything_is_written(config, tmp_path):
    from softmoe_clip.training.loop import train

    with pytest.raises(ValueError, match="chunk_size 3 does not hold whole routing groups of 2"):
        train(config("run", "siglip", "chunk_size=3"))
    assert not (tmp_path / "run").exists()


def train_each(rank, num_processes, port, configs):
    """Be one process of several, in one run after the other."""
    if num_processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["SOFTMOE_CLIP_QUIET"] = "1"
    torch.set_num_threads(1)
    from softmoe_clip.training.loop import train

    for config in configs:
        train(config)
    if num_processes > 1:
        assert torch.distributed.get_world_size() == num_processes
        torch.distributed.destroy_process_group()


def run_processes(num_processes, configs):
    """Start as many processes from one that has imported everything, and wait for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("forkserver")
    context.set_forkserver_preload(["softmoe_clip.training.loop", "softmoe_clip.plugin", "open_clip", "accelerate"])
    processes = [
        context.Process(target=train_each, args=(rank, num_processes, port, configs)) for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(SECONDS)
        assert [process.exitcode for process in processes] == [0] * num_processes
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_one_two_and_four_processes_whole_or_in_chunks_end_with_the_same_weights(config, tmp_path):
    cuts = {"whole": (), "chunks": ("chunk_size=2",)}
    for number in (1, 2, 4):
        configs = [
            config(f"{loss}_{cut}_{number}", loss, "steps=5", *override)
            for loss in VISION
            for cut, override in cuts.items()
        ]
        run_processes(number, configs)
    for loss in VISION:
        for cut in cuts:
            for number in (1, 2, 4):
                run, expected = (tmp_path / f"{loss}_{name}" for name in (f"{cut}_{number}", "whole_1"))
                assert_same_run(run, expected, routing_of(expected))
