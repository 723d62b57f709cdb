"""Model folders: what is written loads again, with the same bits, here and in open_clip; damage is one sentence."""

import json
import pickle
import resource

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.tokenizers import SentencePieceTokenizer, open_clip_tokenizer
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.replaced_folder import beside, restore_previous
from softmoe_clip.models.store import LoadedModel, load, save, transform_of, write_tensors

CAPTIONS = [
    f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("dog", "cat", "circle", "square")
]


def new_model(config, tokenizer):
    torch.manual_seed(0)
    sizes = (tokenizer.vocab_size, tokenizer.context_length)
    model = create_model(config, *sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return LoadedModel(model, tokenizer, transform_of(model), folder_config(config, *sizes))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(CAPTIONS, file, vocab_size=40)
    return SentencePieceTokenizer(file, 8)


@pytest.fixture(scope="module")
def original(tokenizer):
    return new_model(ModelConfig("SoftMoE-demo", init_logit_scale=2.3, init_logit_bias=-10.0), tokenizer)


@pytest.fixture(scope="module")
def folder(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "demo"
    save(original, folder)
    return folder


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))


def features(loaded, picture):
    with torch.inference_mode():
        return (
            loaded.model.encode_image(loaded.transform(picture)[None]),
            loaded.model.encode_text(loaded.tokenizer(CAPTIONS[:3])),
        )


def assert_same_features(one, other, picture):
    for a, b in zip(features(one, picture), features(other, picture), strict=True):
        assert torch.equal(a, b)


def copy_of(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_a_config_saved_with_a_byte_order_mark_is_read(original, folder, tmp_path, picture):
    config = copy_of(folder, tmp_path) / "open_clip_config.json"
    config.write_text(config.read_text("utf-8"), "utf-8-sig")
    assert_same_features(original, load(config.parent), picture)


def test_a_saved_model_loads_with_the_same_bits(original, folder, picture):
    again = load(folder)
    assert_same_features(original, again, picture)
    assert not again.model.training
    assert again.config == original.config
    assert again.image_size == 64
    assert {file.name for file in folder.iterdir()} == {
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.model",
        "softmoe_tokenizer.json",
    }


def test_open_clip_loads_the_folder_with_the_same_bits_and_transform(folder, picture):
    ours = load(folder)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert torch.equal(transform(picture), ours.transform(picture))
    assert_same_features(LoadedModel(model.eval(), ours.tokenizer, transform, None), ours, picture)
    assert model.logit_bias.item() == ours.model.logit_bias.item()


def test_a_model_in_the_home_folder_may_be_named_with_a_tilde(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load(f"local-dir:~/{folder.name}").config == load(folder).config


def test_a_run_folder_and_local_dir_name_the_same_model(folder, tmp_path, picture):
    run = tmp_path / "run"
    run.mkdir()
    copy_of(folder, tmp_path).rename(run / "model")
    for name in (run, str(run), f"local-dir:{run / 'model'}"):
        assert_same_features(load(name), load(folder), picture)


def test_moe_layers_in_a_native_tower_come_back_through_the_softmoe_key(tokenizer, tmp_path, picture):
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16}
    text = {"width": 16, "heads": 2, "layers": 1}
    path = tmp_path / "Small.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    native = new_model(ModelConfig(str(path), MoEConfig(num_experts=4)), tokenizer)
    save(native, tmp_path / "native")
    assert_same_features(native, load(tmp_path / "native"), picture)
    assert "softmoe" in json.loads((tmp_path / "native" / "open_clip_config.json").read_text())
    with pytest.raises(RuntimeError, match="Missing key"):
        open_clip.create_model(f"local-dir:{tmp_path / 'native'}")


def test_the_dtype_can_be_chosen(folder):
    model = load(folder, dtype=torch.bfloat16).model
    assert model.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_clips_own_tokenizer_is_kept(tmp_path, picture):
    config = ModelConfig("PlainViT-demo")
    loaded = new_model(config, open_clip_tokenizer(16))
    save(loaded, tmp_path / "bpe")
    assert_same_features(loaded, load(tmp_path / "bpe"), picture)


def test_saving_again_replaces_the_older_model(original, folder, tmp_path, picture):
    copy = copy_of(folder, tmp_path)
    (copy / "left_over.txt").write_text("from the older model")
    changed = new_model(ModelConfig("PlainViT-demo"), original.tokenizer)
    save(changed, copy)
    assert_same_features(changed, load(copy), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert not (copy / "left_over.txt").exists()


def test_a_save_that_died_between_two_renames_is_undone_by_the_next_load(folder, tmp_path, picture):
    copy = copy_of(folder, tmp_path)
    copy.rename(beside(copy, "previous"))
    assert_same_features(load(copy), load(folder), picture)
    restore_previous(copy)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_full_disk_leaves_the_older_model_and_nothing_half_written(original, folder, tmp_path, picture):
    copy = copy_of(folder, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"no space left while writing .*copy \(.*\): free some space"):
            save(original, copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert_same_features(load(copy), original, picture)


def test_a_folder_that_holds_something_else_is_never_replaced(original, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is no model"):
        save(original, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        save(original, tmp_path / "diary.txt")
    assert (tmp_path / "diary.txt").read_text() == "mine"


def test_a_foreign_model_without_a_config_is_not_saved(original, tmp_path):
    with pytest.raises(ValueError, match="no config to write"):
        save(original._replace(config=None), tmp_path / "foreign")


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_config.json", "tokenizer.model"])
def test_a_file_cut_in_half_is_one_sentence_that_names_it(folder, tmp_path, name):
    copy = copy_of(folder, tmp_path)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name) as error:
        load(copy)
    assert "\n" not in str(error.value)


def test_a_missing_weights_file_is_one_sentence(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    (copy / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no open_clip_model\.safetensors"):
        load(copy)


def test_weights_of_another_model_are_refused(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] += 1
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"beside it, or is damaged: it has no text\.transformer\.resblocks\.\d\.[a-z_.]+$"
    ):
        load(copy)


class RunsCode:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def plain_pickle(content, file):
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_a_pickle_that_runs_code_is_refused_and_never_loaded(folder, tmp_path, name, write):
    copy = copy_of(folder, tmp_path)
    (copy / "open_clip_model.safetensors").unlink()
    write({"weight": RunsCode(tmp_path / "ran")}, copy / name)
    with pytest.raises(ValueError, match=f"{name} .*could run code, so it is not loaded") as error:
        load(copy)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tensors", [{}, {"weight": torch.zeros(2)}])
def test_tensors_of_no_such_model_are_one_sentence(folder, tmp_path, tensors):
    copy = copy_of(folder, tmp_path)
    write_tensors(tensors, copy / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load(copy)


def test_a_checkpoint_of_another_architecture_is_one_sentence(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "plain_vit_demo_patch8_64"
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit") as error:
        load(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "missing"), [("preprocess_cfg", None), ("preprocess_cfg", "mean"), ("model_cfg", "embed_dim")]
)
def test_preprocessing_and_sizes_are_never_guessed(folder, tmp_path, key, missing):
    copy = copy_of(folder, tmp_path)
    config = json.loads((copy / "open_clip_config.json").read_text())
    if missing is None:
        del config[key]
    else:
        del config[key][missing]
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"has no {key} with {missing or 'mean'}"):
        load(copy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/run", "no model at no/such/run"),
        ("local-dir:no/such", "no/such is no model folder"),
        ("ViT-B-61:openai", "did you mean 'ViT-B-16'"),
        ("ViT-B-16:opneai", "did you mean 'openai'"),
        ("SoftMoE-demo:openai", "it has none"),
    ],
)
def test_an_unknown_model_is_one_sentence(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"is no model folder: it has no open_clip_config\.json"):
        load(tmp_path)
