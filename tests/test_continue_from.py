"""`init`: a run starts from any model, also at another resolution."""

import json

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from tiny_bert import write_bert

from softmoe_clip.config import ModelConfig
from softmoe_clip.data_pipelines.tokenizers import TransformersTokenizer, load_tokenizer
from softmoe_clip.models.continue_from import continue_from
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.training.build import build
from softmoe_clip.training.loop import train

TRUNK = "softmoe_vit_tiny_patch16_224"


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


def test_positions_are_resized_and_slots_kept_at_another_resolution(folder_of, architecture_file, tmp_path):
    base = json.loads(architecture_file.read_text())
    vision = {
        "image_size": 64,
        "timm_model_name": "softmoe_vit_demo_patch8_64",
        "timm_pool": "avg",
        "timm_proj": "none",
    }
    base |= {"vision_cfg": vision | {"timm_proj": "none"}, "embed_dim": 128}
    small = architecture(tmp_path, base)
    folder, source, tokenizer = folder_of(small)
    model = create_model(ModelConfig(str(small)), tokenizer.vocab_size, 12)
    model.visual.trunk.set_input_size((96, 96))
    torch.nn.init.zeros_(model.visual.trunk.pos_embed)
    continue_from(model, folder, tokenizer)
    expected = resample_abs_pos_embed(source.visual.trunk.pos_embed, new_size=(12, 12), num_prefix_tokens=0)
    torch.testing.assert_close(model.visual.trunk.pos_embed, expected)
    assert torch.equal(model.visual.trunk.blocks[3].mlp.slot_embed, source.visual.trunk.blocks[3].mlp.slot_embed)


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
