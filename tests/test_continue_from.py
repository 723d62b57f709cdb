"""`init`: a run starts from any model, also at another resolution."""

import json

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from tiny_bert import write_bert

from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.tokenizers import TransformersTokenizer, load_tokenizer
from softmoe_clip.models.continue_from import continue_from
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.training.build import build
from softmoe_clip.training.loop import train


@pytest.fixture
def folder_of(tokenizer_file, tmp_path):
    """Write a model folder of an architecture; return its path, its model and its tokenizer."""

    def make(architecture, name="model"):
        config = ModelConfig(str(architecture), init_logit_scale=1.0)
        tokenizer = load_tokenizer(tokenizer_file, 12)
        model = create_model(config, tokenizer.vocab_size, 12)
        written = folder_config(config, tokenizer.vocab_size, 12)
        save(LoadedModel(model, tokenizer, transform_of(model), written), tmp_path / name)
        return str(tmp_path / name), model, tokenizer

    return make


def architecture(tmp_path, base, **vision):
    file = tmp_path / f"arch_{len(list(tmp_path.iterdir()))}.json"
    file.write_text(json.dumps(base | {"vision_cfg": base["vision_cfg"] | vision}))
    return file


def test_every_weight_is_taken_over(folder_of, architecture_file):
    folder, source, tokenizer = folder_of(architecture_file)
    model = create_model(ModelConfig(str(architecture_file)), tokenizer.vocab_size, 12)
    continue_from(model, folder, tokenizer)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_logit_bias_that_the_source_lacks_stays_new(folder_of, architecture_file):
    folder, _, tokenizer = folder_of(architecture_file)
    model = create_model(ModelConfig(str(architecture_file), init_logit_bias=-10.0), tokenizer.vocab_size, 12)
    continue_from(model, folder, tokenizer)
    assert model.logit_bias.item() == -10


@pytest.mark.parametrize("given", [{}, {"init_logit_scale": 2.5}, {"init_logit_bias": -3.0}])
def test_a_run_starts_from_the_logit_scale_and_bias_of_its_config_else_from_the_models(
    tiny_config, tmp_path, monkeypatch, given
):
    monkeypatch.chdir(tmp_path)
    source = load(train(tiny_config("steps=2", "out=source"))).model
    settings = [f"model.{name}={value}" for name, value in given.items()]
    model = build(tiny_config("out=second", "init=source", *settings)).model
    expected = {f"init_{name}": getattr(source, name).item() for name in ("logit_scale", "logit_bias")} | given
    assert {name: getattr(model, name.removeprefix("init_")).item() for name in expected} == expected


@pytest.mark.parametrize(("trunk", "prefix"), [("vit_tiny_patch16", 1), ("deit3_small_patch16", 0)])
def test_positions_are_resized_and_slots_kept_at_another_resolution(
    tmp_path, tokenizer_file, architecture_file, trunk, prefix
):
    tokenizer = load_tokenizer(tokenizer_file, 12)
    moe, models = MoEConfig(layers=[11], num_experts=2), {}
    for size in (224, 384):
        base = json.loads(architecture_file.read_text()) | {"vision_cfg": {}}
        vision = {"image_size": size, "timm_model_name": f"{trunk}_{size}", "timm_pool": "token", "timm_proj": "linear"}
        config = ModelConfig(str(architecture(tmp_path, base, **vision)), image_moe=moe)
        models[size] = create_model(config, tokenizer.vocab_size, 12)
        written = folder_config(config, tokenizer.vocab_size, 12)
        save(LoadedModel(models[size], tokenizer, transform_of(models[size]), written), tmp_path / str(size))
    small, large = (models[size].visual.trunk for size in (224, 384))
    continue_from(models[384], str(tmp_path / "224"), tokenizer, written)
    expected = resample_abs_pos_embed(small.pos_embed, new_size=(24, 24), num_prefix_tokens=prefix)
    torch.testing.assert_close(large.pos_embed, expected)
    assert torch.equal(large.blocks[11].mlp.slot_embed, small.blocks[11].mlp.slot_embed)


def test_open_clips_own_tower_is_resized_too(folder_of, architecture_file, tmp_path):
    folder, _, tokenizer = folder_of(architecture_file)
    large = architecture(tmp_path, json.loads(architecture_file.read_text()), image_size=48)
    model = create_model(ModelConfig(str(large)), tokenizer.vocab_size, 12)
    continue_from(model, folder, tokenizer)
    assert model.visual.positional_embedding.shape == (37, 32)


def test_another_architecture_is_refused_with_the_first_difference(folder_of, architecture_file, tmp_path):
    folder, _, tokenizer = folder_of(architecture_file)
    deeper = architecture(tmp_path, json.loads(architecture_file.read_text()), layers=3)
    model = create_model(ModelConfig(str(deeper)), tokenizer.vocab_size, 12)
    with pytest.raises(ValueError, match=r"not built as `model` says: it has no visual\.transformer\.resblocks\.2"):
        continue_from(model, folder, tokenizer)


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(
    ("tower", "change", "told"),
    [
        ("vision_cfg", {"pool_type": "avg"}, "image embeddings differ by"),
        ("vision_cfg", {"head_width": 8}, "image embeddings differ by"),
        ("text_cfg", {"heads": 1}, "text embeddings differ by"),
        ("text_cfg", {"pool_type": "first"}, "text embeddings differ by"),
        (None, {"quick_gelu": True}, "image embeddings differ by .* and text embeddings differ by"),
    ],
)
def test_a_model_that_computes_something_else_from_the_same_weights_is_refused(
    folder_of, architecture_file, tmp_path, size, tower, change, told
):
    folder, _, tokenizer = folder_of(architecture_file)
    base = json.loads(architecture_file.read_text())
    other = base | change if tower is None else base | {tower: base[tower] | change}
    model = create_model(ModelConfig(str(architecture(tmp_path, other, image_size=size))), tokenizer.vocab_size, 12)
    with pytest.raises(ValueError, match=f"computes something else from its weights .*{told}"):
        continue_from(model, folder, tokenizer)
    assert model.training


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.image_moe.normalize=false", r"its experts are model.image_moe=\{num_experts: 4\}"),
        ("model.image_moe.router=uniform_soft", r"its experts are model.image_moe=\{num_experts: 4\}"),
        ("model.image_moe.activation=gelu", r"its experts are model.image_moe=\{num_experts: 4\}"),
        ("model.image_moe.num_experts=2", r"slot_embed is \[32, 4, 1\] there, \[32, 2, 1\] here"),
        ("model.image_moe=null", r"its experts are model.image_moe=\{num_experts: 4\}"),
    ],
)
def test_other_experts_are_refused_with_what_to_write(tiny_config, tmp_path, monkeypatch, change, told):
    monkeypatch.chdir(tmp_path)
    train(tiny_config("steps=1", "optim.warmup=0", "out=source"))
    with pytest.raises(ValueError, match=told):
        build(tiny_config("out=second", "init=source", change))


def test_capacity_and_noise_may_change(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sparse = "model.image_moe={router: tokens_choice, num_experts: 4}"
    source = load(train(tiny_config("steps=1", "optim.warmup=0", "out=source", sparse))).model.state_dict()
    other = "model.image_moe={router: tokens_choice, num_experts: 4, capacity_factor: 2.0, top_k: 2, noise_std: 1.0}"
    found = build(tiny_config("out=second", "init=source", other)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in source.items())


def test_another_capacity_hides_no_other_function(tiny_config, architecture_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sparse = "model.image_moe={router: tokens_choice, num_experts: 4}"
    train(tiny_config("steps=1", "optim.warmup=0", "out=source", sparse))
    other_heads = architecture(tmp_path, json.loads(architecture_file.read_text()), head_width=8)
    changed = "model.image_moe={router: tokens_choice, num_experts: 4, capacity_factor: 2.0}"
    with pytest.raises(ValueError, match="computes something else"):
        build(tiny_config("out=second", "init=source", f"model.arch={other_heads}", changed))


def test_weights_that_are_no_numbers_are_told_as_such(folder_of, architecture_file):
    folder, source, tokenizer = folder_of(architecture_file)
    with torch.no_grad():
        source.visual.proj[0] = torch.nan
    save(load(folder)._replace(model=source), folder)
    model = create_model(ModelConfig(str(architecture_file)), tokenizer.vocab_size, 12)
    with pytest.raises(ValueError, match=r"init: visual\.proj of .* holds NaN or infinity"):
        continue_from(model, folder, tokenizer)


def test_another_tokenizer_is_refused(folder_of, architecture_file):
    folder, _, tokenizer = folder_of(architecture_file)
    model = create_model(ModelConfig(str(architecture_file)), tokenizer.vocab_size, 12)
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        continue_from(model, folder, lambda texts: tokenizer(texts) + 1)


@pytest.mark.parametrize("length", [5, 20])
def test_a_tower_of_transformers_may_take_captions_of_another_length(architecture_file, tmp_path, length):
    write_bert(tmp_path / "bert")

    def made(length):
        config = ModelConfig(str(architecture_file), text_tower=str(tmp_path / "bert"), context_length=length)
        tokenizer = TransformersTokenizer(tmp_path / "bert", length)
        sizes = tokenizer.vocab_size, length
        model = create_model(config, *sizes)
        return LoadedModel(model, tokenizer, transform_of(model), folder_config(config, *sizes))

    save(made(12), tmp_path / "model")
    source, (model, tokenizer, _, _) = load(tmp_path / "model").model, made(length)
    continue_from(model, str(tmp_path / "model"), tokenizer)
    assert torch.equal(model.visual.conv1.weight, source.visual.conv1.weight)
    with pytest.raises(ValueError, match="trained with another tokenizer"):
        continue_from(model, str(tmp_path / "model"), lambda texts: tokenizer(texts) + 1)


def test_a_run_sees_pictures_as_the_model_it_starts_from_and_goes_on_and_branches_so(
    tiny_config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    trained = load(train(tiny_config("steps=2", "out=first")))
    seen = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.2], "interpolation": "bilinear", "resize_mode": "shortest"}
    written = trained.config | {"preprocess_cfg": trained.config["preprocess_cfg"] | seen}
    save(trained._replace(config=written), tmp_path / "source")
    run = train(tiny_config("steps=2", "out=second", "init=source", "optim.schedule=constant"))
    (tmp_path / "source").rename(tmp_path / "gone")
    train(tiny_config("steps=3", "out=second", "init=source", "optim.schedule=constant"))
    branch = train(tiny_config("steps=4", "out=third", "init=second/checkpoints/step_00000003"))
    for folder in (run, branch):
        found = load(folder).preprocess_cfg
        assert {name: found[name] for name in seen} == seen
        assert found["size"] == trained.preprocess_cfg["size"]
    again = json.loads((run / "versions.json").read_text())["preprocess_cfg"]
    assert {name: again[name] for name in seen} == seen
