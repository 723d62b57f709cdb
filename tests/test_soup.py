"""Soups: means of weights, uniform, weighted and greedy."""

import pytest
import torch
from safetensors.torch import load_file

from softmoe_clip.config import ModelConfig
from softmoe_clip.data_pipelines.tokenizers import load_tokenizer
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.soup import greedy_soup, soup
from softmoe_clip.models.store import LoadedModel, save, transform_of

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def models(architecture_file, tokenizer_file, tmp_path):
    """Three models of one architecture, with different weights."""
    config, tokenizer = ModelConfig(str(architecture_file)), load_tokenizer(tokenizer_file, 12)
    names = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = create_model(config, tokenizer.vocab_size, 12)
        written = folder_config(config, tokenizer.vocab_size, 12)
        names.append(str(tmp_path / f"model_{seed}"))
        save(LoadedModel(model, tokenizer, transform_of(model), written), names[-1])
    return names


def weights(folder):
    return load_file(f"{folder}/{WEIGHTS}")


def test_a_uniform_soup_is_the_mean(models, tmp_path):
    mixed = weights(soup(models, tmp_path / "soup"))
    for name, tensor in mixed.items():
        expected = sum(weights(model)[name].double() for model in models) / 3
        torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=1e-6, atol=1e-7)


def test_weights_are_shares_and_one_alone_gives_that_model_back(models, tmp_path):
    mixed = weights(soup(models[:2], tmp_path / "a", [3.0, 1.0]))
    first, second = (weights(model) for model in models[:2])
    name = "visual.proj"
    torch.testing.assert_close(mixed[name], 0.75 * first[name] + 0.25 * second[name])
    alone = weights(soup(models[:2], tmp_path / "b", [0.0, 5.0]))
    assert all(torch.equal(alone[name], second[name]) for name in second)


def test_a_greedy_soup_keeps_only_what_helps(models, tmp_path):
    # The score is how near the projection is to the mean of models 2 and 0, which lies far from model 1.
    target = (weights(models[0])["visual.proj"] + weights(models[2])["visual.proj"]) / 2
    taken = greedy_soup(models, tmp_path / "soup", lambda one: -(one.model.visual.proj - target).norm().item())
    assert sorted(taken) == [models[0], models[2]]
    torch.testing.assert_close(weights(tmp_path / "soup")["visual.proj"], target)


def test_mistakes_are_named_and_nothing_is_written(models, softmoe_clip, tmp_path):
    for arguments, message in (
        ([models[0], tmp_path / "out"], "two models or more"),
        ([*models[:2], tmp_path / "out", "--weights", "1"], "one finite weight for each of the 2 models"),
        ([*models[:2], tmp_path / "out", "--weights", "1,x"], "numbers with commas"),
        ([*models[:2], tmp_path / "out", "--weights", "1,nan"], "finite"),
        ([*models[:2], tmp_path / "out", "--weights", "1,inf"], "finite"),
        ([*models[:2], tmp_path / "out", "--metric", "recall"], "--metric is for --suite"),
        ([*models[:2], tmp_path / "out", "--suite", "s.yaml", "--weights", "1,1"], "--weights or --suite, not both"),
        ([models[0], tmp_path / "gone", tmp_path / "out"], "no model at"),
    ):
        done = softmoe_clip("soup", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_forgotten_out_does_not_cost_the_last_model(models, softmoe_clip):
    before = weights(models[2])
    done = softmoe_clip("soup", *models)
    assert done.returncode == 2
    assert "exists and is not empty" in done.stderr
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(models[2]).items())


def test_the_command_writes_a_model_that_loads(models, softmoe_clip, tmp_path):
    done = softmoe_clip("soup", *models, tmp_path / "out")
    assert done.returncode == 0
    assert (tmp_path / "out" / WEIGHTS).exists()
