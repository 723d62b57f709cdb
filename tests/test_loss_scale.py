"""fp16 with its loss scale, on a CPU: steps that overflow are passed over, and the scale goes on with the run."""

import json
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from softmoe_clip.training.checkpoint import Progress, load_newest, save_checkpoint
from softmoe_clip.training.checksums import write_checksums
from softmoe_clip.training.loop import train

WEIGHTS = "model/open_clip_model.safetensors"
SPEED = ("pairs_per_second", "seconds")
SETTINGS = ("optim.schedule=constant", "ema={decay: 0.5}", "precision=fp16")
LARGE = 2.0**60  # the first steps overflow


@pytest.fixture(autouse=True)
def fp16_on_a_cpu(tmp_path, monkeypatch):
    """Accelerate computes in fp16 on GPUs alone; all that is other here is that torch's scaler is that for CPUs."""

    def make_accelerator(precision):
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=LARGE, growth_interval=2, backoff_factor=2.0**-12)
        accelerator.native_amp = True
        return accelerator

    monkeypatch.setattr("softmoe_clip.training.loop.make_accelerator", make_accelerator)
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)  # another precision than that of the runs before
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def metrics(run):
    """The numbers of each line, without those that tell how fast it was."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]


def assert_same_run(run, other, steps):
    for name in (WEIGHTS, "model_ema/open_clip_model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    for file in (other / f"checkpoints/step_{steps:08d}").iterdir():
        assert (run / file.relative_to(other)).read_bytes() == file.read_bytes(), file.name


def scale_after(run, step):
    return json.loads((run / f"checkpoints/step_{step:08d}/loss_scale.json").read_text())


def test_steps_that_overflow_change_no_weight_and_end_no_run(tiny_config):
    run = train(tiny_config(*SETTINGS, "steps=12", "keep_last=20", "checkpoint_every=1", "optim.warmup=0"))
    states = [scale_after(run, step) for step in range(1, 13)]
    scales = [LARGE, *(state["scale"] for state in states)]
    skipped = [after < before for before, after in pairwise(scales)]
    assert skipped[0]
    assert not all(skipped[:-2])
    assert any(after > before for before, after in pairwise(scales))
    files = [run / f"checkpoints/step_{step:08d}" for step in range(1, 13)]
    weights = [load_file(file / "model.safetensors")["visual.conv1.weight"] for file in files]
    moved = [not torch.equal(*pair) for pair in pairwise(weights)]
    assert moved == [not was for was in skipped[1:]]
    counted = load_file(files[-1] / "optimizer.safetensors")["visual.conv1.weight|step"]
    assert counted == len(skipped) - sum(skipped)
    assert all(tensor.isfinite().all() for tensor in load_file(files[-1] / "ema.safetensors").values())
    lines = metrics(run)
    assert [line["lr"] for line in lines] == [0.001] * 12
    assert [line["gradient_norm"] is None for line in lines] == skipped


@pytest.mark.parametrize("stops", [(2, 5), (7,)])
def test_a_run_goes_on_with_its_loss_scale(tiny_config, stops):
    whole = train(tiny_config("out=whole", "steps=9", *SETTINGS))
    for step in (*stops, 9):
        run = train(tiny_config(f"steps={step}", *SETTINGS))
    assert_same_run(run, whole, 9)
    assert metrics(run) == metrics(whole)


def test_a_branch_goes_on_with_its_trunks_loss_scale(tiny_config):
    whole = train(tiny_config("out=whole", "steps=8", *SETTINGS))
    train(tiny_config("out=trunk", "steps=4", *SETTINGS))
    branch = train(tiny_config("out=branch", "steps=8", "init=trunk/checkpoints/step_00000004", *SETTINGS))
    assert_same_run(branch, whole, 8)


def test_a_checkpoint_from_before_loss_scales_were_kept_is_taken_and_the_scale_begins_anew(tiny_config):
    run = train(tiny_config("steps=4", *SETTINGS))
    (run / "checkpoints/step_00000004/loss_scale.json").unlink()
    write_checksums(run / "checkpoints/step_00000004")
    train(tiny_config("steps=5", *SETTINGS))
    assert scale_after(run, 5)["scale"] == LARGE * 2.0**-12


@pytest.mark.parametrize("growth_tracker", [0, 3])
def test_a_loss_scale_comes_back_as_it_was(tmp_path, growth_tracker):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    scaler, found = torch.amp.GradScaler("cpu", init_scale=2.0**-20), torch.amp.GradScaler("cpu")
    scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": growth_tracker})
    save_checkpoint(tmp_path, model, optimizer, Progress(1, 8), keep_last=1, scaler=scaler)
    load_newest(tmp_path, model, optimizer, warn=None, scaler=found)
    assert found.state_dict() == scaler.state_dict()
    assert found.scale(torch.ones(())).item() == 2.0**-20
