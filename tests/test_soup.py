"""Soups: means of weights, uniform, weighted and greedy."""

import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.tokenizers import load_tokenizer
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer
from softmoe_clip.eval.config import SuiteConfig, TaskConfig
from softmoe_clip.eval.results import is_rank
from softmoe_clip.eval.suites import run_suite
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.soup import greedy_soup, soup
from softmoe_clip.models.store import LoadedModel, load, load_encoder, save, transform_of
from softmoe_clip.models.upcycle import upcycle
from softmoe_clip.training.loop import train

NATIVE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def model_at(architecture_file, tokenizer_file, tmp_path):
    """Write a model folder with weights of its own; return its path."""

    def make(name, seed=0, context_length=12, **settings):
        tokenizer = load_tokenizer(tokenizer_file, context_length)
        arguments = ModelConfig(str(architecture_file), **settings), tokenizer.vocab_size, context_length
        torch.manual_seed(seed)
        model, written = create_model(*arguments), folder_config(*arguments)
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


def test_a_greedy_soup_adds_from_the_best_on_and_keeps_only_what_helps(models, tmp_path):
    # The score is how near the logit scale is to 0. In order of index, model 0 would be tried second, and kept.
    for model, scale in zip(models, (-2.5, -2.0, 1.0), strict=True):
        loaded = load(model)
        torch.nn.init.constant_(loaded.model.logit_scale, scale)
        save(loaded, model)
    taken = greedy_soup(models, tmp_path / "soup", lambda one: -abs(one.model.logit_scale.item()))
    assert taken == [models[2], models[1]]
    mixed, second, first = (weights(folder) for folder in (tmp_path / "soup", *models[1:]))
    for name, tensor in mixed.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


@pytest.fixture
def suite(scenes, tmp_path):
    """A suite file whose second task, on pictures that are not there, is not needed."""
    tasks = [
        {"kind": "retrieval", "name": "x", "data": f"{scenes}/val"},
        {"kind": "negation", "name": "y", "data": "no"},
    ]
    (tmp_path / "suite.yaml").write_text(json.dumps({"tasks": tasks}))
    return tmp_path / "suite.yaml"


@pytest.mark.parametrize("metric", ["recall@10", "median_rank"])
def test_a_greedy_soup_starts_from_the_best_by_a_metric_of_a_suite(
    models, suite, softmoe_clip, scenes, tmp_path, metric
):
    metric = f"retrieval/x/text_to_image/{metric}"
    one_task = SuiteConfig((TaskConfig("retrieval", "x", f"{scenes}/val"),))
    values = [run_suite(load_encoder(model, "cpu"), one_task).metrics[metric] for model in models]
    assert len(set(values)) > 1
    best = (min if is_rank(metric) else max)(values)
    settings = ["--device", "cpu", "--precision", "float32", "--batch-size", "7"]
    done = softmoe_clip("soup", *models, tmp_path / "out", "--suite", suite, "--metric", metric, *settings)
    assert done.returncode == 0, done.stderr
    taken = done.stdout.split()
    assert taken[0] == models[values.index(best)]
    mixed = run_suite(load_encoder(str(tmp_path / "out"), "cpu"), one_task).metrics[metric]
    assert mixed <= best if is_rank(metric) else mixed >= best


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--metric must be one of a task of the suite (retrieval/x/..., negation/y/...), got None"),
        (["--metric", "retrieval/z/recall@1"], "got retrieval/z/recall@1"),
        (["--metric", "retrieval/x/recall@1"], "must be one of retrieval/x/image_to_text/recall@1, "),
        (["--metric", "retrieval/x/text_to_image/recall@1", "--device", "cudda"], "device 'cudda' cannot be used here"),
        (["--metric", "retrieval/x/text_to_image/recall@1", "--precision", "half"], "precision must be one of float32"),
        (["--metric", "retrieval/x/text_to_image/recall@1", "--batch-size", "0"], "batch_size must be at least 1"),
    ],
)
def test_what_a_greedy_soup_cannot_be_scored_with_is_named(models, suite, softmoe_clip, tmp_path, arguments, told):
    done = softmoe_clip("soup", *models, tmp_path / "out", "--suite", suite, *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named_and_nothing_is_written(models, softmoe_clip, tmp_path):
    for arguments, message in (
        ([models[0], tmp_path / "out"], "two models or more"),
        ([*models[:2], tmp_path / "out", "--weights", "1"], "one finite weight for each of the 2 models"),
        ([*models[:2], tmp_path / "out", "--weights", "1,x"], "numbers with commas"),
        ([*models[:2], tmp_path / "out", "--weights", "1,nan"], "finite"),
        ([*models[:2], tmp_path / "out", "--weights", "1,inf"], "finite"),
        ([*models[:2], tmp_path / "out", "--metric", "recall"], "are for --suite"),
        ([*models[:2], tmp_path / "out", "--device", "cpu"], "are for --suite"),
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


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("model_cfg", {"quick_gelu": True}, "model_cfg.quick_gelu is true, not false"),
        ("preprocess_cfg", {"mean": [0.4, 0.5, 0.6]}, "preprocess_cfg.mean is [0.4, 0.5, 0.6], not [0.5, 0.5, 0.5]"),
        ("preprocess_cfg", {"fill_color": 7}, "preprocess_cfg.fill_color is 7, not 0"),
        ("softmoe", {"image_moe": {"num_experts": 2, "normalize": False}}, "image_moe.normalize is false, not true"),
    ],
)
def test_the_first_setting_that_differs_is_named_with_both_values(
    model_at, softmoe_clip, tmp_path, section, values, told
):
    one = model_at("one", image_moe=MoEConfig(num_experts=2))
    other = changed(one, tmp_path / "other", **{section: values})
    done = softmoe_clip("soup", one, other, tmp_path / "out")
    assert done.returncode == 2
    assert f"{other} is not built as {one}: " in done.stderr
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"context_length": 9}, "model_cfg.text_cfg.context_length is 12, not 9"),
        ({"image_moe": MoEConfig(num_experts=2)}, "its image tower has no experts"),
    ],
)
def test_models_of_another_architecture_are_refused(models, model_at, tmp_path, settings, told):
    other = model_at("other", context_length=settings.pop("context_length", 12), **settings)
    with pytest.raises(ValueError, match=re.escape(told)):
        soup([other, models[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_in_one_model_alone_are_told_as_such(models, model_at, tmp_path):
    dense = model_at("dense")
    with pytest.raises(ValueError, match=r"its image tower has experts \(soft\)"):
        soup([dense, model_at("soft", image_moe=MoEConfig(num_experts=2))], tmp_path / "out")


def test_what_does_not_change_a_model_may_differ(models, model_at, tmp_path):
    text_cfg = load(models[1]).config["model_cfg"]["text_cfg"] | {"mlp_ratio": 4}
    config = {"model_cfg": {"init_logit_scale": 3.0, "quick_gelu": False, "text_cfg": text_cfg}}
    config["preprocess_cfg"] = {"fill_color": 0, "mode": "RGB", "size": [32, 32]}
    other = changed(models[1], tmp_path / "other", **config)
    dense = model_at("dense", image_moe=MoEConfig(router="dense"))
    soup([models[0], other, dense], tmp_path / "a")
    first, second = (
        model_at(
            f"moe_{layers}", image_moe=MoEConfig(router="tokens_choice", num_experts=2, layers=layers, noise_std=noise)
        )
        for layers, noise in (("last_half", 0.0), ([1], 1.0))
    )
    soup([first, second], tmp_path / "b")


def test_a_model_without_a_logit_bias_goes_with_that_of_the_others(models, model_at, tmp_path):
    ends = [models[0], model_at("biased", seed=5, init_logit_bias=-10.0)]
    for number, shares in enumerate(([1.0, 1.0], [0.0, 1.0], [1.0, 0.0])):
        mixed = load(soup(ends, tmp_path / f"out_{number}", shares)).model
        assert mixed.logit_bias.item() == -10


@pytest.fixture
def tagged(tmp_path, monkeypatch):
    """A small model that open_clip knows by NAME:TAG, where preprocessing is that of the tag."""
    (tmp_path / "NativeSoup.json").write_text(json.dumps(NATIVE))
    open_clip.add_model_config(tmp_path / "NativeSoup.json")
    save_file(open_clip.CLIP(**NATIVE).state_dict(), tmp_path / "weights.safetensors")
    tag = {"file": str(tmp_path / "weights.safetensors"), "mean": [0.4] * 3, "std": [0.3] * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "NativeSoup", {"mine": tag | {"interpolation": "bilinear"}})
    return "NativeSoup:mine"


@pytest.mark.parametrize("start", ["tag", "open_clip's folder", "upcycled"])
def test_a_model_of_open_clips_mixes_with_the_run_that_started_from_it(tagged, tiny_config, tmp_path, start):
    settings, native = ["model.image_moe=null"], tagged
    if start == "open_clip's folder":
        native, preprocess = str(tmp_path / "native"), load(tagged).preprocess_cfg
        Path(native).mkdir()
        Path(native, "open_clip_config.json").write_text(
            json.dumps({"model_cfg": NATIVE, "preprocess_cfg": preprocess})
        )
        Path(native, WEIGHTS).write_bytes((tmp_path / "weights.safetensors").read_bytes())
    if start == "upcycled":
        upcycle(tagged, native := str(tmp_path / "native"), 3)
        settings = ["model.image_moe.num_experts=3", "model.image_moe.activation=gelu"]
    settings += [f"init={native}", "model.arch=NativeSoup", "tokenizer=open_clip"]
    run = str(train(tiny_config("steps=2", "optim.warmup=1", *settings)))
    first, second = (load(end).model.state_dict() for end in (native, run))
    expected = {name: (first.get(name, tensor) + tensor) / 2 for name, tensor in second.items()}
    for number, ends in enumerate(([native, run], [run, native])):
        mixed = load(soup(ends, tmp_path / f"wise_{number}"))
        torch.testing.assert_close(dict(mixed.model.state_dict()), expected)
        assert mixed.preprocess_cfg == load(native).preprocess_cfg


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
