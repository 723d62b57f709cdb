"""Checkpoints: the same bits back, damage named and passed over, nothing half-written, the newest kept."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from softmoe_clip.config import OptimConfig
from softmoe_clip.training.checkpoint import Progress, load_newest, save_checkpoint, step_of
from softmoe_clip.training.optim import adamw
from softmoe_clip.training.run_folder import newest_step

CONFIG = OptimConfig(lr=0.01)


def a_model(seed=0, width=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    return model, adamw(model, CONFIG)


def learn(model, optimizer, steps, seed=0):
    for step in range(steps):
        model(torch.randn(5, 3, generator=torch.Generator().manual_seed(seed + step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moments(model, optimizer):
    return {(n, k): v.clone() for n, p in model.named_parameters() for k, v in optimizer.state[p].items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def saved(folder, *steps, keep_last=10, keep_every=0):
    """Write checkpoints after these steps; return what the model held at each of them."""
    model, optimizer = a_model()
    states = {}
    for step in steps:
        learn(model, optimizer, 1, seed=step)
        save_checkpoint(folder, model, optimizer, Progress(step, step * 8), keep_last, keep_every)
        states[step] = weights(model)
    return states


def refuse_warnings(text):
    raise AssertionError(text)


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
    left = tmp_path / f".step_00000003.{os.getpid()}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert save_checkpoint(tmp_path, *a_model(), Progress(3, 24), keep_last=2).is_dir()
    assert load_newest(tmp_path, *a_model(seed=1), refuse_warnings).step == 3


def test_a_checkpoint_gives_the_same_bits_back_and_the_same_steps_after_it(tmp_path):
    model, optimizer = a_model()
    learn(model, optimizer, 3)
    save_checkpoint(tmp_path, model, optimizer, Progress(3, 24), keep_last=2)
    found_model, found_optimizer = a_model(seed=1)
    learn(found_model, found_optimizer, 1, seed=50)  # what stood in the optimizer before must not shine through
    assert load_newest(tmp_path, found_model, found_optimizer, refuse_warnings) == Progress(3, 24)
    assert_equal(weights(found_model), weights(model))
    assert_equal(moments(found_model, found_optimizer), moments(model, optimizer))
    assert {key for _, key in moments(model, optimizer)} == {"step", "exp_avg", "exp_avg_sq"}
    for pair in (model, optimizer), (found_model, found_optimizer):
        learn(*pair, 3, seed=100)
    assert_equal(weights(found_model), weights(model))


def test_without_checkpoints_a_run_begins_at_step_0(tmp_path):
    model, optimizer = a_model()
    before = weights(model)
    assert load_newest(tmp_path / "none", model, optimizer, refuse_warnings) == Progress(0, 0)
    assert_equal(weights(model), before)


@pytest.mark.parametrize("name", ["step_00000004.bak", "step_00000004 (copy)", "step_", "step_-0000001"])
def test_a_folder_with_another_name_is_left_alone(tmp_path, name, folder_bytes):
    saved(tmp_path / "checkpoints", 4)
    foreign = shutil.copytree(tmp_path / "checkpoints/step_00000004", tmp_path / "checkpoints" / name)
    before = folder_bytes(foreign)
    saved(tmp_path / "checkpoints", 2, 3, keep_last=1)
    assert newest_step(tmp_path) == 3
    assert load_newest(tmp_path / "checkpoints", *a_model(), refuse_warnings).step == 3
    assert folder_bytes(foreign) == before
    shutil.rmtree(tmp_path / "checkpoints/step_00000003")
    assert newest_step(tmp_path) == load_newest(tmp_path / "checkpoints", *a_model(), refuse_warnings).step == 0
    with pytest.raises(ValueError, match=r"is no checkpoint .*: move it to another folder"):
        step_of(name)


def cut_in_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [cut_in_half, lambda f: f.unlink(), lambda f: f.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, name, damage):
    states = saved(tmp_path, 2, 4, 6)
    damage(tmp_path / "step_00000006" / name)
    model, optimizer = a_model(seed=1)
    warnings = []
    assert load_newest(tmp_path, model, optimizer, warnings.append) == Progress(4, 32)
    assert_equal(weights(model), states[4])
    assert len(warnings) == 1
    assert f"{tmp_path}/step_00000006 is damaged" in warnings[0]
    assert "\n" not in warnings[0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "progress.json"])
def test_one_flipped_bit_is_found(tmp_path, name):
    states = saved(tmp_path, 2, 4)
    file = tmp_path / "step_00000004" / name
    data = bytearray(file.read_bytes())
    data[-2 if name == "progress.json" else -1] ^= 1  # a digit, or the last byte of a tensor: both can still be read
    file.write_bytes(data)
    model, optimizer = a_model(seed=1)
    warnings = []
    assert load_newest(tmp_path, model, optimizer, warnings.append) == Progress(2, 16)
    assert_equal(weights(model), states[2])
    assert warnings == [f"checkpoint {tmp_path}/step_00000004 is damaged ({name} has other bytes than SHA256SUMS says)"]


@pytest.mark.parametrize("damage", [lambda f: f.write_bytes(b""), lambda f: f.write_bytes(f.read_bytes()[:-90])])
def test_checksums_that_are_not_whole_are_damage_too(tmp_path, damage):
    saved(tmp_path, 2, 4)
    damage(tmp_path / "step_00000004/SHA256SUMS")
    warnings = []
    assert load_newest(tmp_path, *a_model(), warnings.append).step == 2
    assert "step_00000004 is damaged" in warnings[0]


def test_a_checkpoint_from_before_there_were_checksums_is_taken_as_it_is(tmp_path):
    states = saved(tmp_path, 2)
    (tmp_path / "step_00000002/SHA256SUMS").unlink()
    model, optimizer = a_model(seed=1)
    assert load_newest(tmp_path, model, optimizer, refuse_warnings).step == 2
    assert_equal(weights(model), states[2])


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_people_can_check_a_checkpoint_themselves(tmp_path):
    saved(tmp_path, 2)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "step_00000002", capture_output=True)
    assert done.returncode == 0
    assert done.stdout.count(b": OK") == 3


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_by_itself(tmp_path):
    saved(tmp_path, 2, 4)
    for step in (2, 4):
        cut_in_half(tmp_path / f"step_0000000{step}/model.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: remove that folder to begin the run anew"):
        load_newest(tmp_path, *a_model(), lambda text: None)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    saved(tmp_path, 2)
    with pytest.raises(ValueError, match="step_00000002 holds another model than the config describes"):
        load_newest(tmp_path, *a_model(width=5), refuse_warnings)


def test_only_the_newest_checkpoints_stay(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_some_checkpoints_stay_for_good(tmp_path):
    saved(tmp_path, *range(1, 12), keep_last=2, keep_every=4)
    assert sorted(path.name[-2:] for path in tmp_path.iterdir()) == ["04", "08", "10", "11"]


def test_what_is_kept_for_good_must_be_written_at_all(tiny_config):
    assert tiny_config("keep_every=4").keep_every == 4
    for wrong in (["keep_every=3"], ["keep_every=4", "checkpoint_every=0"], ["keep_every=-2"]):
        with pytest.raises(ValueError, match=r"keep_every must be (a multiple of checkpoint_every|0 or more), got"):
            tiny_config(*wrong)


@pytest.mark.parametrize("setting", ["checkpoint_every", "eval.every"])
def test_an_interval_below_zero_is_refused(tiny_config, setting):
    with pytest.raises(ValueError, match=rf"{setting} must be 0 or more, got -5"):
        tiny_config(f"{setting}=-5")


def test_a_checkpoint_that_stands_there_already_is_replaced(tmp_path):
    saved(tmp_path, 2)
    model, optimizer = a_model(seed=7)
    learn(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, Progress(2, 16), keep_last=2)
    found, found_optimizer = a_model()
    load_newest(tmp_path, found, found_optimizer, refuse_warnings)
    assert_equal(weights(found), weights(model))


def test_what_a_killed_process_left_and_what_is_damaged_goes_at_the_next_checkpoint(tmp_path):
    saved(tmp_path, 2, 6)
    cut_in_half(tmp_path / "step_00000006/model.safetensors")
    (tmp_path / ".step_00000007.99").mkdir()
    (tmp_path / ".step_00000007.99/model.safetensors").write_bytes(b"half")
    model, optimizer = a_model()
    done = load_newest(tmp_path, model, optimizer, lambda text: None)
    learn(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, Progress(done.step + 2, 32), keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_checkpoint as t
model, optimizer = t.a_model()
t.learn(model, optimizer, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    t.save_checkpoint(Path(sys.argv[1]), model, optimizer, t.Progress(4, 32), 1)
except OSError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize("bytes_free", [100, 600])
def test_on_a_full_disk_nothing_half_written_stays_and_the_old_checkpoint_does(tmp_path, request, bytes_free):
    states = saved(tmp_path, 2)
    before, limits = sizes(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(request.path.parent), str(bytes_free)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr.startswith(f"refused: no space left while writing {tmp_path}/step_00000004 (")
    assert "Traceback" not in done.stderr
    assert sizes(tmp_path) == before
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limits
    model, optimizer = a_model()
    assert load_newest(tmp_path, model, optimizer, refuse_warnings).step == 2
    assert_equal(weights(model), states[2])


def sizes(folder):
    return {str(file): file.stat().st_size for file in folder.rglob("*")}


def test_progress_is_readable_by_people(tmp_path):
    saved(tmp_path, 2)
    assert json.loads((tmp_path / "step_00000002/progress.json").read_text()) == {"step": 2, "samples_seen": 16}
