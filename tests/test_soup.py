"""Soups: means of weights, uniform, weighted and greedy."""

import pytest
import torch
from safetensors.torch import load_file

from softmoe_clip.config import ModelConfig
from softmoe_clip.data_pipelines.tokenizers import load_tokenizer, train_tokenizer
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.soup import greedy_soup, soup
from softmoe_clip.models.store import LoadedModel, load, save, transform_of

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def model_at(architecture_file, tokenizer_file, tmp_path):
    """Write a model folder with weights of its own; return its path."""

    def make(name, seed=0, tokenizer_file=tokenizer_file, **settings):
        config, tokenizer = ModelConfig(str(architecture_file), **settings), load_tokenizer(tokenizer_file, 12)
        torch.manual_seed(seed)
        model = create_model(config, tokenizer.vocab_size, 12)
        written = folder_config(config, tokenizer.vocab_size, 12)
        save(LoadedModel(model, tokenizer, transform_of(model), written), tmp_path / name)
        return str(tmp_path / name)

    return make


@pytest.fixture
def models(model_at):
    """Three models of one architecture, with different weights."""
    return [model_at(f"model_{seed}", seed) for seed in range(3)]


def changed(folder, out, **sections):
    """Write a model again, with other values in sections of its config."""
    loaded = load(folder)
    sections = {name: loaded.config[name] | section for name, section in sections.items()}
    save(loaded._replace(config=loaded.config | sections), out)
    return str(out)


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


def test_another_tokenizer_is_refused_also_one_of_the_same_size(models, model_at, tmp_path):
    size = load_tokenizer(models[0]).vocab_size
    captions = [f"zot {a}{b}{c} {c}{b}{a}" for a in "bdfkpz" for b in "aeiou" for c in "gmnrst"]
    train_tokenizer(captions, tmp_path / "pieces", size)
    tokenizer = load_tokenizer(tmp_path / "pieces", 12)
    assert tokenizer.vocab_size == size
    save(load(models[0])._replace(tokenizer=tokenizer), tmp_path / "other")
    with pytest.raises(ValueError, match=r"other was trained with another tokenizer than .*model_1"):
        soup([models[1], str(tmp_path / "other")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(models, tmp_path, value):
    broken = load(models[1])
    broken.model.visual.proj.data[3, 4] = value
    save(broken, tmp_path / "broken")
    with pytest.raises(ValueError, match=r"visual\.proj of .*broken holds NaN or infinity"):
        soup([models[0], str(tmp_path / "broken")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
