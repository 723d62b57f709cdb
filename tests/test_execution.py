"""How towers are run changes no number: computed again for backward, or compiled."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from open_clip.model import CustomTextCLIP
from safetensors.torch import load_file
from sharded_processes import look
from torch import nn

from softmoe_clip.config import ModelConfig, TrainConfig
from softmoe_clip.data_pipelines.strict import load_strict
from softmoe_clip.models.create import create_model
from softmoe_clip.training.execution import checkpoint_gradients
from softmoe_clip.training.loop import train

WEIGHTS = "model/open_clip_model.safetensors"


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def with_masks(tiny_settings, tmp_path):
    """Settings of a run with patch dropout and router noise, whose metrics and weights are looked at."""
    architecture = json.loads(Path(tiny_settings["model"]["arch"]).read_text())
    architecture["vision_cfg"]["patch_dropout"] = 0.5
    file = tmp_path / "masked.json"
    file.write_text(json.dumps(architecture))
    noisy = {"router": "tokens_choice", "num_experts": 4, "noise_std": 1.0}
    return tiny_settings | {"model": {"arch": str(file), "image_moe": noisy}, "steps": 3}


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("moe", ["soft", "tokens_choice"])
def test_a_run_that_computes_blocks_again_is_the_same_run(with_masks, tmp_path, chunk_size, moe, monkeypatch):
    if moe == "soft":
        with_masks["model"]["image_moe"] = {"num_experts": 4}
    runs, calls = {}, []

    def checkpoint(*arguments, **options):
        calls.append(arguments)
        return torch.utils.checkpoint.checkpoint(*arguments, **options)

    monkeypatch.setattr("open_clip.transformer.checkpoint", checkpoint)
    for again in (False, True):
        settings = with_masks | {"out": str(tmp_path / str(again)), "grad_checkpointing": again}
        runs[again] = train(load_strict(TrainConfig, settings, [f"chunk_size={chunk_size or 'null'}"]))
        assert bool(calls) == again
    for line, other in zip(metrics(runs[True]), metrics(runs[False]), strict=True):
        assert line.keys() == other.keys()  # routing statistics and auxiliary losses too
        for name in line.keys() - {"pairs_per_second", "seconds"}:
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
    weights, others = (load_file(runs[again] / WEIGHTS) for again in (True, False))
    for name in others:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["SoftMoE-demo", "PlainViT-demo", "SoftMoE-demo-text"])
def test_our_architectures_compute_blocks_again_and_get_the_same_gradients(name):
    torch.manual_seed(0)
    model = create_model(ModelConfig(name), 100, 8)
    images, token_ids = torch.randn(2, 3, *model.visual.image_size), torch.randint(1, 99, (2, 8))
    passes = Counter()
    for part in [name for name, _ in model.named_modules() if name.endswith("blocks.1.mlp")]:
        model.get_submodule(part).register_forward_pre_hook(lambda *_, part=part: passes.update([part]))
    gradients = {}
    for again in (False, True):
        if again:
            checkpoint_gradients(model)
        out = model(images, token_ids)
        (out["image_features"] * out["text_features"].roll(1, 0)).sum().backward()
        gradients[again] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    assert list(passes.values()) == [3, 3]  # in each tower once, then twice
    assert gradients[True].keys() == gradients[False].keys()
    for n, gradient in gradients[False].items():
        torch.testing.assert_close(gradients[True][n], gradient, rtol=1e-5, atol=1e-7, msg=n)


def test_a_tower_that_keeps_everything_is_refused():
    towers = CustomTextCLIP.__new__(CustomTextCLIP)
    nn.Module.__init__(towers)
    towers.visual, towers.text = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match=r"grad_checkpointing: a tower has no such thing \(.*\): leave it out"):
        checkpoint_gradients(towers)


def test_fp16_on_a_cpu_is_refused_in_one_sentence(tiny_config):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="precision=fp16 needs a GPU: take bf16 or float32"):
        train(tiny_config("precision=fp16"))


@pytest.mark.slow
def test_compiled_towers_train_the_same_model_under_the_same_names(with_masks, tmp_path):
    from omegaconf import OmegaConf

    settings = with_masks | {"out": str(tmp_path / "plain"), "optim": {"lr": 0.001, "warmup": 0, "eps": 1e-4}}
    plain = train(load_strict(TrainConfig, settings))
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    compiled, shared = tmp_path / "compiled", tmp_path / "shared"
    said = look(1, tmp_path, "compiled_run", str(file), f"out={compiled}")
    said += look(2, tmp_path, "compiled_run", str(file), f"out={shared}", "sharding=full")
    assert all(told["graphs"] > 1 for told in said)
    for run in (compiled, shared):
        weights, others = load_file(run / WEIGHTS), load_file(plain / WEIGHTS)
        assert weights.keys() == others.keys()
        for name in others:
            torch.testing.assert_close(weights[name], others[name], rtol=1e-4, atol=1e-5, msg=name)
        for line, other in zip(metrics(run), metrics(plain), strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    # A checkpoint of either goes on as the other.
    shutil.rmtree(compiled / "model")
    assert train(load_strict(TrainConfig, settings | {"out": str(compiled), "steps": 4}))
