"""Runs whose weights, gradients and optimizer state are shared out over processes make the model that one makes."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sharded_processes import look, run_verb

from softmoe_clip.training.sharding import is_sharded, shard

# A larger eps: Adam divides noise by itself where a gradient should be zero, as that of a key's bias.
SETTINGS = ("optim.eps=0.0001", "optim.schedule=constant", "steps=4", "checkpoint_every=2")
WEIGHTS = "model/open_clip_model.safetensors"
EXPERTS = "visual.transformer.resblocks.1.mlp.experts.w_in"


@pytest.fixture
def finish(tiny_yaml, tmp_path):
    """Train to the end in so many processes; the first of them says how many took part."""

    def run(name, num_processes, *overrides):
        done = run_verb(num_processes, tmp_path, "train", tiny_yaml, f"out={tmp_path / name}", *SETTINGS, *overrides)
        assert [status for status, _ in done] == [0] * num_processes, done
        assert f"{num_processes} process(es) on cpu" in done[0][1]
        shares = num_processes > 1 and "sharding=full" in overrides
        assert (f"shared out over {num_processes} processes: this one holds" in done[0][1]) == shares
        return tmp_path / name

    return run


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(found, expected, files=(WEIGHTS,), tolerance=1e-4):
    for file in files:
        weights, others = (load_file(run / file) for run in (found, expected))
        assert weights.keys() == others.keys()
        for name in weights:
            torch.testing.assert_close(
                weights[name], others[name], rtol=tolerance, atol=tolerance / 10, msg=f"{file} {name}"
            )
    lines, others = metrics(found), metrics(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for name in ("loss", "gradient_norm", "logit_scale", "val/loss", "distill_loss"):
        numbers = [[line[name] for line in run if name in line] for run in (lines, others)]
        torch.testing.assert_close(*numbers, rtol=tolerance, atol=tolerance / 10, msg=name)


@pytest.fixture
def timm_file(architecture_file, tmp_path):
    """A tower of timm's, whose positions have a first axis of 1, which two processes cannot share out."""
    architecture = json.loads(architecture_file.read_text())
    names = {"timm_model_name": "softmoe_vit_demo_patch8_64", "timm_pool": "avg", "timm_proj": "linear"}
    architecture["vision_cfg"] = {"image_size": 64, "timm_drop_path": 0.4, **names}
    file = tmp_path / "timm.json"
    file.write_text(json.dumps(architecture))
    return file


@pytest.mark.slow
def test_two_processes_with_shares_train_the_model_that_one_trains(finish, scenes):
    settings = ("chunk_size=3", "ema.every=1", f"data.val={scenes}/val", "eval.every=2", "loss=clip")
    one, two = finish("one", 1, *settings), finish("two", 2, *settings, "sharding=full")
    assert_same_run(two, one, files=(WEIGHTS, "model_ema/open_clip_model.safetensors"))
    assert len([line for line in metrics(two) if "val/loss" in line]) == 2


@pytest.mark.slow
def test_so_do_they_with_open_clips_own_model_whose_text_projection_lies_outside_of_its_towers(
    finish, architecture_file, tmp_path
):
    architecture = json.loads(architecture_file.read_text()) | {"custom_text": False}
    text = ("context_length", "vocab_size", "width", "heads", "layers")
    architecture["text_cfg"] = {name: architecture["text_cfg"][name] for name in text}
    file = tmp_path / "native.json"
    file.write_text(json.dumps(architecture))
    settings = (f"model.arch={file}", "model.image_moe.num_experts=4", "steps=2")
    assert_same_run(finish("two", 2, *settings, "sharding=full"), finish("one", 1, *settings))


@pytest.mark.slow
def test_so_do_they_with_a_tower_of_timm_that_is_computed_again_for_backward(finish, timm_file):
    settings = (f"model.arch={timm_file}", "model.image_moe=null", "steps=3")
    one, two = finish("one", 1, *settings), finish("two", 2, *settings, "sharding=full", "grad_checkpointing=true")
    assert_same_run(two, one)
    finish("two", 2, *settings, "sharding=full", "steps=4")
    assert metrics(two)[-1]["step"] == 4


@pytest.mark.slow
def test_a_full_disk_of_one_process_stops_both_and_leaves_the_older_checkpoint(finish, tiny_yaml, tmp_path):
    run = finish("run", 2, "sharding=full", "steps=2")
    part = max(file.stat().st_size for file in (run / "checkpoints/step_00000002").iterdir())
    arguments = ("train", tiny_yaml, f"out={run}", *SETTINGS, "sharding=full", "steps=4")
    done = run_verb(2, tmp_path, *arguments, largest_file=part // 2)
    assert [status for status, _ in done] == [2, 2], done
    assert all("no space left while writing" in text for _, text in done)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.slow
def test_as_many_processes_go_on_from_a_sharded_checkpoint_to_the_bit_and_one_or_four_to_float_error(
    finish, tmp_path, tiny_yaml
):
    sharded = ("sharding=full", "ema.every=1")
    whole = finish("whole", 2, *sharded)
    bits = (WEIGHTS, "model_ema/open_clip_model.safetensors")
    checkpoint = whole / "checkpoints/step_00000004"
    names = [file.name for file in sorted(checkpoint.iterdir())]
    parts = names[2:]
    assert names == ["SHA256SUMS", "progress.json", *parts]
    assert len(parts) == 2
    sums = (checkpoint / "SHA256SUMS").read_text()
    assert all(part in sums for part in parts)
    for part in parts:  # experts by expert, with their moments and averages
        with safe_open(checkpoint / part, "pt") as file:
            keys = (f"model/{EXPERTS}", f"optimizer/{EXPERTS}|exp_avg", f"ema/{EXPERTS}")
            assert [file.get_slice(key).get_shape() for key in keys] == [[2, 32, 128]] * 3

    for name, num_processes, settings in (("two", 2, sharded), ("one", 1, sharded[1:]), ("four", 4, sharded)):
        run = tmp_path / name
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints/step_00000004")
        shutil.rmtree(run / "model")
        (run / "metrics.jsonl").write_text("")
        finish(name, num_processes, *settings)
        for file in bits:
            weights, others = (load_file(folder / file) for folder in (run, whole))
            for key in others:
                if name == "two":
                    assert torch.equal(weights[key], others[key]), key
                else:
                    torch.testing.assert_close(weights[key], others[key], rtol=1e-4, atol=1e-5, msg=key)
    last = {path.name for path in (tmp_path / "one/checkpoints/step_00000004").iterdir()}
    assert {"model.safetensors", "optimizer.safetensors"} < last
    shutil.rmtree(tmp_path / "one/model")  # and back: a whole checkpoint, gone on from with sharding
    finish("one", 2, *sharded, "steps=5")
    damaged = checkpoint / parts[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    shutil.rmtree(whole / "model")
    done = run_verb(2, tmp_path, "train", tiny_yaml, f"out={whole}", *SETTINGS, *sharded)
    assert [status for status, _ in done] == [0, 0]
    assert f"step_00000004 is damaged ({parts[1]} has other bytes than SHA256SUMS says)" in done[0][1]
    assert "going on after step 2 of 4" in done[0][1]
    assert all(
        torch.equal(load_file(whole / bits[0])[key], load_file(tmp_path / "two" / bits[0])[key]) for key in others
    )


@pytest.mark.slow
def test_each_process_holds_its_share_of_every_parameter_and_of_the_experts(tiny_yaml, tmp_path):
    found = look(2, tmp_path, "shares", str(tiny_yaml))
    assert [(held["processes"], held["rank"]) for held in found] == [(2, 0), (2, 1)]
    for held in found:
        assert held["by_rows"]
        assert held["whole"][EXPERTS] == [4, 32, 128]
        assert held["local"][EXPERTS] == [2, 32, 128]
        assert held["scalars"] == ["logit_scale", "logit_bias", "visual.transformer.resblocks.1.mlp.router_scale"]
    for name, shape in found[0]["whole"].items():
        assert sum(held["local"][name][0] for held in found) == shape[0]


@pytest.mark.slow
def test_optimizers_that_take_a_share_for_the_whole_are_refused(tiny_yaml, tmp_path):
    said = look(2, tmp_path, "optimizers", str(tiny_yaml), "lion", "nadamw", "lamb", "mars")
    assert said[0] == said[1]
    assert said[0]["lion"] == said[0]["nadamw"] == ""
    for name in ("lamb", "mars"):
        assert said[0][name].startswith(f"optim.name={name} cannot be used with sharding=full: ")


@pytest.mark.slow
def test_frozen_parts_a_teacher_and_half_precision_can_be_sharded(finish, tmp_path):
    teacher = finish("teacher", 1)
    optimizer = ("optim.name=nadamw", "optim.eps=1e-8", "optim.options.eps=0.0001")
    settings = ("freeze=['^text[.]','resblocks.0']", f"distill.model={teacher}", "precision=bf16", *optimizer)
    # Each half of the batch is rounded as it is: what two processes compute is compared with what two compute.
    both, shares = finish("both", 2, *settings), finish("shares", 2, *settings, "sharding=full")
    assert_same_run(shares, both)
    assert len([line["distill_loss"] for line in metrics(shares)]) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["precision=fp16"], "sharding=full cannot skip steps in all processes alike, as fp16 must: take bf16"),
        (["lora.targets=[mlp]"], "sharding=full has no adapters"),
        (["data.image_features=features", "data.augment=none"], "sharding=full needs pictures"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(tiny_config, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("sharding=full", *settings)


def test_a_process_alone_holds_everything(tiny_config):
    model = torch.nn.Linear(2, 2)
    shard(model, tiny_config("sharding=full"), 1, torch.device("cpu"))
    assert not is_sharded(model)
