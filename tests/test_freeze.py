"""What is frozen stays as it was, in eval mode and outside the optimizer; the run says what it trains."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from softmoe_clip.training.freeze import freeze, in_words, train_mode, trained_names
from softmoe_clip.training.loop import train
from softmoe_clip.training.optim import adamw


@pytest.fixture
def towers():
    visual = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model = nn.ModuleDict({"visual": visual, "text": nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))})
    model.logit_scale = nn.Parameter(torch.ones(()))
    return model


def test_frozen_parameters_get_no_gradient_and_no_place_in_the_optimizer(towers, tiny_config):
    freeze(towers, [r"visual\..*"])
    assert trained_names(towers) == ["logit_scale", "text.0.weight", "text.0.bias"]
    held = {id(p) for group in adamw(towers, tiny_config().optim).param_groups for p in group["params"]}
    assert held == {id(p) for name, p in towers.named_parameters() if not name.startswith("visual")}
    train_mode(towers)
    assert not towers["visual"](torch.randn(4, 2)).requires_grad


def test_a_frozen_tower_stays_in_eval_mode_and_the_other_one_trains(towers):
    freeze(towers, ["visual"])
    train_mode(towers)
    assert not any(module.training for module in towers["visual"][0::2])
    assert not towers["visual"].training
    assert towers["text"][1].training
    before = towers["visual"][2].running_mean.clone()
    towers["visual"](torch.randn(4, 2))
    assert torch.equal(towers["visual"][2].running_mean, before)


def test_a_frozen_block_alone_is_in_eval_mode(towers):
    freeze(towers, [r"visual\.2\."])
    train_mode(towers)
    assert not towers["visual"][2].training
    assert towers["visual"].training


def test_it_says_how_much_of_each_part_is_trained(towers):
    freeze(towers, ["visual"])
    assert in_words(towers) == "logit_scale 1 of 1, visual 0 of 15, text 9 of 9"


@pytest.mark.parametrize(
    ("patterns", "message"),
    [(["visul"], "'visul' is found in no parameter name"), (["visual", "text"], "leave nothing to train")],
)
def test_mistakes_are_named(towers, patterns, message):
    with pytest.raises(ValueError, match=message):
        freeze(towers, patterns)


def test_a_run_leaves_a_frozen_tower_bit_for_bit_as_it_was(tiny_config):
    started = train(tiny_config("steps=1", "optim.warmup=1", "seed=5"))
    first = load_file(started / "model/open_clip_model.safetensors")
    config = tiny_config(f"out={started.parent / 'lit'}", f"init={started}", 'freeze=["^visual"]')
    second = load_file(train(config) / "model/open_clip_model.safetensors")
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert not any(name.startswith("visual") for name in changed)
    listed = (started.parent / "lit/trained_parameters.txt").read_text().splitlines()
    assert changed <= set(listed)
    assert not any(name.startswith("visual") for name in listed)
