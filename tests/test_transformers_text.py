"""Text towers of transformers in a local folder, through open_clip's own HFTextEncoder."""

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from safetensors.torch import load_file
from tiny_bert import VOCABULARY, write_bert

from softmoe_clip.config import ModelConfig, MoEConfig, TrainConfig
from softmoe_clip.data_pipelines.strict import load_strict
from softmoe_clip.data_pipelines.tokenizers import TransformersTokenizer
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.models.summary import summary
from softmoe_clip.training import build
from softmoe_clip.training.loop import train

CAPTIONS = ["a red dog", "the blue house, photo of cats", ""]
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers") / "bert"
    write_bert(folder)
    return folder


def architecture(bert, folder, **text_cfg):
    """Write an architecture in open_clip's format whose text tower is in a folder of transformers'."""
    named = {"hf_model_name": str(bert), "hf_tokenizer_name": str(bert), "hf_proj_type": "linear", "context_length": 10}
    path = folder / "Bert.json"
    path.write_text(json.dumps({"embed_dim": 12, "vision_cfg": VISION, "text_cfg": named | text_cfg}))
    return str(path)


def new_model(bert, folder):
    """A model with the folder's weights and a projection that is not the start."""
    config = ModelConfig(architecture(bert, folder))
    tokenizer = TransformersTokenizer(bert, 10)
    sizes = (tokenizer.vocab_size, tokenizer.context_length)
    torch.manual_seed(1)
    model = create_model(config, *sizes, eos_id=tokenizer.eos_id).eval()
    return LoadedModel(model, tokenizer, transform_of(model), folder_config(config, *sizes, tokenizer.eos_id))


def embeddings(loaded):
    with torch.inference_mode():
        return loaded.model.encode_text(loaded.tokenizer(CAPTIONS))


def test_captions_are_embedded_with_the_folders_weights_and_padding_is_masked(bert, tmp_path):
    from transformers import BertModel

    loaded = new_model(bert, tmp_path)
    assert isinstance(loaded.model.text, HFTextEncoder)
    pretrained = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    for caption, found in zip(CAPTIONS, embeddings(loaded), strict=True):
        ids = torch.tensor([loaded.tokenizer.tokenizer.tokenizer(caption).input_ids])  # no padding at all
        expected = loaded.model.text.proj(pretrained(ids).last_hidden_state.mean(1))[0]
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)


def moved(bert, folder):
    """Save a model, take its transformers folder away and move it; return it and where it is."""
    shutil.copytree(bert, folder / "bert")
    loaded = new_model(folder / "bert", folder)
    save(loaded, folder / "model")
    shutil.rmtree(folder / "bert")
    return loaded, (folder / "model").rename(folder / "moved")


def test_the_model_folder_can_be_moved_away_from_the_transformers_folder(bert, tmp_path):
    loaded, place = moved(bert, tmp_path)
    again = load(place)
    assert torch.equal(embeddings(loaded), embeddings(again))
    assert torch.equal(loaded.tokenizer(CAPTIONS), again.tokenizer(CAPTIONS))
    save(again, tmp_path / "saved again")
    assert torch.equal(embeddings(loaded), embeddings(load(tmp_path / "saved again")))


def test_open_clip_loads_the_folder_with_the_same_bits_and_tokenizer(bert, tmp_path):
    loaded = new_model(bert, tmp_path)
    save(loaded, tmp_path / "model")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'model'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'model'}")
    assert torch.equal(embeddings(LoadedModel(model.eval(), tokenizer, transform, None)), embeddings(loaded))


def test_a_folder_that_open_clip_users_made_keeps_its_tokenizer_when_saved(bert, tmp_path):
    loaded = new_model(bert, tmp_path)
    save(loaded, tmp_path / "theirs")
    (tmp_path / "theirs" / "softmoe_tokenizer.json").unlink()
    theirs = load(tmp_path / "theirs")
    save(theirs, tmp_path / "ours")
    assert torch.equal(embeddings(load(tmp_path / "ours")), embeddings(loaded))


def test_a_run_takes_the_tokenizer_that_the_architecture_names(bert, tmp_path, tiny_settings):
    settings = {**tiny_settings, "model": {"arch": architecture(bert, tmp_path)}, "tokenizer": "open_clip"}
    loaded = build.build(load_strict(TrainConfig, {**settings, "out": str(tmp_path / "run")}, ()))
    assert isinstance(loaded.tokenizer, TransformersTokenizer)
    assert loaded.config["model_cfg"]["text_cfg"]["vocab_size"] == len(VOCABULARY)
    assert np.isfinite(embeddings(loaded).numpy()).all()


@pytest.mark.parametrize(
    ("text_cfg", "message"),
    [
        ({"vocab_size": 99}, r"text_cfg.vocab_size \(the tokenizer's\) is 99, but .*bert has 17"),
        ({"context_length": 77}, r"text_cfg.context_length \(the tokenizer's\) is 77, but .*bert has 32"),
        ({"hf_proj_type": None}, "hf_proj_type is None, but what .*bert gives must be projected to embed_dim 12"),
        ({"hf_model_name": "/no/such/folder"}, "describes no model that can be built: .*/no/such/folder"),
    ],
)
def test_what_does_not_fit_is_one_sentence(bert, tmp_path, text_cfg, message):
    with pytest.raises(ValueError, match=message) as error:
        create_model(ModelConfig(architecture(bert, tmp_path, **text_cfg)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reads", [1, None])
def test_padding_that_the_tower_would_read_as_words_is_refused_at_the_start_and_at_loading(
    bert, tmp_path, tiny_settings, reads
):
    other = tmp_path / "other"
    shutil.copytree(bert, other)
    config = json.loads((other / "config.json").read_text()) | {"pad_token_id": reads}
    (other / "config.json").write_text(json.dumps(config))
    told = f"the tokenizer pads captions with id 0, but the text tower takes {reads} for padding"
    settings = tiny_settings | {"model": {"arch": architecture(other, tmp_path)}, "tokenizer": "open_clip"}
    with pytest.raises(ValueError, match=told):
        train(load_strict(TrainConfig, settings | {"out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()
    save(new_model(other, tmp_path), tmp_path / "model")
    with pytest.raises(ValueError, match=told):
        load(tmp_path / "model")


def test_the_summary_of_a_moved_folder_needs_no_transformers_folder(bert, tmp_path):
    loaded, place = moved(bert, tmp_path)
    found = summary(str(place))
    assert found["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert found["loads_with"] == "softmoe_clip.load"


@pytest.fixture
def lit_settings(bert, tmp_path, tiny_settings):
    """A tiny run whose text tower is a copy of the folder of transformers', which stays as it is."""
    shutil.copytree(bert, tmp_path / "bert")
    model = {**tiny_settings["model"], "text_tower": str(tmp_path / "bert")}
    return {**tiny_settings, "model": model, "tokenizer": "open_clip", "freeze": ["^text[.]transformer"]}


def test_a_run_keeps_a_frozen_text_tower_and_its_folder_goes_anywhere(bert, lit_settings, tmp_path):
    run = train(load_strict(TrainConfig, {**lit_settings, "out": str(tmp_path / "run")}, ()))
    shutil.rmtree(tmp_path / "bert")
    (run / "model").rename(tmp_path / "moved")
    loaded, theirs = load(tmp_path / "moved"), load_file(bert / "model.safetensors")
    inner = loaded.model.text.transformer.state_dict()
    assert inner
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in inner.items())
    assert loaded.tokenizer.vocab_size == len(VOCABULARY)
    assert loaded.tokenizer.context_length == 12  # the architecture's
    trained = (run / "trained_parameters.txt").read_text().split()
    assert [name for name in trained if name.startswith("text")] == ["text.proj.weight"]


def test_adapters_go_into_a_transformers_tower(lit_settings, bert, tmp_path):
    lora = {"targets": ["text[.].*attention.*(query|value)"], "rank": 2}
    run = train(load_strict(TrainConfig, {**lit_settings, "out": str(tmp_path / "run"), "lora": lora}, ()))
    theirs = load_file(bert / "model.safetensors")
    changed = {
        name for name, t in load(run).model.text.transformer.state_dict().items() if not torch.equal(t, theirs[name])
    }
    assert {name.split(".")[-2] for name in changed} == {"query", "value"}


def test_a_text_tower_that_is_not_there_is_one_sentence_at_once(lit_settings, tmp_path):
    lit_settings["model"]["text_tower"] = "no/such/folder"
    with pytest.raises(ValueError, match="text_tower: no/such/folder is no folder of transformers'"):
        train(load_strict(TrainConfig, {**lit_settings, "out": str(tmp_path / "run")}, ()))
    assert not (tmp_path / "run").exists()


def test_soft_moe_does_not_go_into_a_transformers_tower(bert, tmp_path):
    with pytest.raises(ValueError, match=r"a text tower of transformers' \(HFTextEncoder\): take our text tower"):
        create_model(ModelConfig(architecture(bert, tmp_path), text_moe=MoEConfig(num_experts=2)))


def test_an_encoder_of_a_kind_that_open_clip_does_not_run_is_named(tmp_path, bert):
    from transformers import DistilBertConfig, DistilBertModel

    shutil.copytree(bert, tmp_path / "distilled")
    sizes = {"vocab_size": len(VOCABULARY), "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}
    DistilBertModel(DistilBertConfig(**sizes)).save_pretrained(tmp_path / "distilled")
    with pytest.raises(ValueError, match=r"runs no text encoder of the kind in .*distilled .*: it knows BERT, RoBERTa"):
        create_model(ModelConfig(architecture(tmp_path / "distilled", tmp_path)), len(VOCABULARY), 10)


def test_an_encoder_of_mt5_saved_alone_is_taken_once_its_config_says_what_is_asked_for(tmp_path, bert):
    from transformers import MT5Config, MT5EncoderModel

    shutil.copytree(bert, tmp_path / "mt5")
    sizes = {"vocab_size": len(VOCABULARY), "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    encoder = MT5EncoderModel(MT5Config(**sizes, pad_token_id=0))
    encoder.save_pretrained(tmp_path / "mt5")
    model_config = ModelConfig(architecture(tmp_path / "mt5", tmp_path))
    with pytest.raises(ValueError, match=r"mT5 and M2M-100 with is_encoder_decoder true in their config\.json"):
        create_model(model_config, len(VOCABULARY), 10)
    file = tmp_path / "mt5" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_encoder_decoder": True}))
    tower = create_model(model_config, len(VOCABULARY), 10).text.transformer
    assert all(torch.equal(weight, encoder.encoder.state_dict()[name]) for name, weight in tower.state_dict().items())
