"""Averaged weights: the average of a plain loop, the model's own bits given back, runs that write and measure it."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from softmoe_clip.config import EmaConfig, TrainConfig
from softmoe_clip.data_pipelines.strict import load_strict
from softmoe_clip.training.build import build
from softmoe_clip.training.ema import Ema
from softmoe_clip.training.loop import train

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def averaged_run(tiny_settings, scenes, tmp_path_factory):
    """Six steps with an average of a frozen text tower, each step's checkpoint kept."""
    out = str(tmp_path_factory.mktemp("averaged") / "run")
    more = {"out": out, "checkpoint_every": 1, "keep_last": 9, "freeze": ["^text[.]transformer"], "eval": {"every": 6}}
    settings = tiny_settings | more | {"data": tiny_settings["data"] | {"val": str(scenes / "val")}}
    config = load_strict(TrainConfig, settings | {"ema": {"decay": 0.8, "warmup": False}})
    return train(config), config


def by_hand(values, config):
    average = values[0].double()
    for step, value in enumerate(values[1:], 1):
        if step % config.every == 0:
            updates = step // config.every
            decay = min(config.decay, (1 + updates) / (10 + updates)) if config.warmup else config.decay
            average = decay * average + (1 - decay) * value.double()
    return average.float()


@pytest.mark.parametrize(
    "config",
    [EmaConfig(0.9, warmup=False), EmaConfig(0.9), EmaConfig(0.5, every=3, warmup=False), EmaConfig(0.9, every=3)],
)
def test_an_average_is_that_of_a_plain_loop(config):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema, values = Ema(model, config), [model.weight.detach().clone()]
    for step in range(1, 30):
        with torch.no_grad():
            model.weight += torch.randn(2, 3)
        ema.update(model, step)
        values.append(model.weight.detach().clone())
    torch.testing.assert_close(ema.averages["weight"], by_hand(values, config), rtol=1e-5, atol=1e-6)


def test_a_model_computes_with_its_averages_and_gets_its_own_bits_back():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema = Ema(model, EmaConfig())
    assert ema.averages.keys() == {"weight"}
    ema.averages["weight"].zero_()
    before, pointer = model.weight.detach().clone(), model.weight.data_ptr()
    with ema.in_place(model):
        assert torch.equal(model(torch.ones(1, 3)), model.bias[None])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), ema.in_place(model):
        model(torch.ones(1, 4))
    assert torch.equal(model.weight, before)
    assert model.weight.data_ptr() == pointer
    assert torch.equal(ema.averages["weight"], torch.zeros(2, 3))


def test_a_run_writes_the_average_of_the_weights_of_its_steps(averaged_run):
    run, config = averaged_run
    steps = [build(config).model.state_dict()]
    steps += [load_file(path / "model.safetensors") for path in sorted((run / "checkpoints").iterdir())]
    assert len(steps) == 7
    averaged, raw = load_file(run / "model_ema" / WEIGHTS), load_file(run / "model" / WEIGHTS)
    for name, tensor in averaged.items():
        torch.testing.assert_close(
            tensor, by_hand([s[name] for s in steps], config.ema), rtol=1e-5, atol=1e-6, msg=name
        )
        assert torch.equal(raw[name], steps[-1][name])
    assert not torch.equal(averaged["visual.conv1.weight"], raw["visual.conv1.weight"])
    kept = load_file(run / "checkpoints/step_00000006/ema.safetensors").keys()
    assert kept == set((run / "trained_parameters.txt").read_text().split())
    assert not any(name.startswith("text.transformer") for name in kept)


def test_evaluation_during_training_measures_the_average(averaged_run):
    import json

    from softmoe_clip.data_pipelines.tar_index import ShardSet
    from softmoe_clip.models.store import load_encoder
    from softmoe_clip.training.measure import validation_loss

    run, config = averaged_run
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "val/loss" in line]
    losses = {
        name: validation_loss(load_encoder(run / name), ShardSet.open(config.data.val), config.loss, config.batch_size)
        for name in ("model", "model_ema")
    }
    assert found[-1]["val/loss"] == pytest.approx(losses["model_ema"], rel=1e-5)
    assert losses["model"] != pytest.approx(losses["model_ema"], rel=1e-5)


def test_training_itself_does_not_know_of_the_average(averaged_run, tiny_config):
    run, _ = averaged_run
    without = train(tiny_config("freeze=['^text[.]transformer']"))
    assert (without / "model" / WEIGHTS).read_bytes() == (run / "model" / WEIGHTS).read_bytes()
    assert not (without / "model_ema").exists()


@pytest.mark.parametrize("settings", [{"decay": 1.0}, {"every": 0}])
def test_an_average_that_never_moves_is_refused(settings):
    with pytest.raises(ValueError, match=r"ema\.decay is 0 or more and below 1, ema\.every counts from 1"):
        EmaConfig(**settings)
