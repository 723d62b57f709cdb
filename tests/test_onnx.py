"""ONNX files of both towers: complete, for any batch, and what onnxruntime computes is what torch computes."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from tiny_bert import write_bert, write_tokenizer

from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.tokenizers import (
    SentencePieceTokenizer,
    TransformersTokenizer,
    load_tokenizer,
    open_clip_tokenizer,
)
from softmoe_clip.data_pipelines.train_tokenizer import train_tokenizer
from softmoe_clip.models import onnx as module
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.onnx import UnitVectors, difference, export_onnx, settings_of, write_tower
from softmoe_clip.models.store import LoadedModel, save, transform_of
from softmoe_clip.moe.soft import Routing, SoftMoE

CAPTIONS = ["a red dog", "a blue cat in front of a house", "", "two green dogs", "a photo of a house"]
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(CAPTIONS[:2] + CAPTIONS[3:], file, vocab_size=40)
    return SentencePieceTokenizer(file, 8)


def new_model(tmp_path, tokenizer, vision=VISION, text=TEXT, **config):
    """A tiny model whose weights all differ from each other."""
    path = tmp_path / "Tiny.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    config = ModelConfig(str(path), **config)
    sizes = (tokenizer.vocab_size, tokenizer.context_length)
    torch.manual_seed(0)
    model = create_model(config, *sizes, eos_id=tokenizer.eos_id).eval()
    move(model)
    return LoadedModel(model, tokenizer, transform_of(model), folder_config(config, *sizes, tokenizer.eos_id))


@torch.no_grad()
def move(model):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)


def run(file, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def test_missing_packages_are_one_sentence_that_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(ValueError, match=r"needs no_such_package: pip install 'softmoe-clip\[onnx\]'"):
        export_onnx("anything", tmp_path / "out")


def test_a_folder_that_holds_something_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_onnx("no/such/model", tmp_path)


@pytest.mark.parametrize("router", ["tokens_choice", "experts_choice"])
def test_pictures_that_route_together_are_not_exported(tmp_path, tokenizer, monkeypatch, router):
    loaded = new_model(tmp_path, tokenizer, image_moe=MoEConfig(router=router, num_experts=2, group_size=4))
    monkeypatch.setattr(module, "load", lambda model: loaded)
    with pytest.raises(ValueError, match=r"image/block_1 is a .*ChoiceMoE that routes 4 pictures together"):
        export_onnx("model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_assignment_that_onnx_cannot_compute_is_told_as_such(tmp_path, tokenizer, monkeypatch):
    loaded = new_model(tmp_path, tokenizer, image_moe=MoEConfig(router="base", num_experts=2))
    monkeypatch.setattr(module, "load", lambda model: loaded)
    with pytest.raises(ValueError, match="image/block_1 has the router base, whose assignment no ONNX file computes"):
        export_onnx("model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", module.PREPROCESSING)
def test_preprocessing_is_never_guessed(tmp_path, tokenizer, monkeypatch, name):
    loaded = new_model(tmp_path, tokenizer)
    loaded.model.visual.preprocess_cfg = {k: v for k, v in loaded.preprocess_cfg.items() if k != name}
    monkeypatch.setattr(module, "load", lambda model: loaded)
    with pytest.raises(ValueError, match=rf"how it sees pictures \({name}\)"):
        export_onnx("model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_colour_that_pictures_are_filled_up_with_is_told(tmp_path, tokenizer):
    loaded = new_model(tmp_path, tokenizer)
    assert settings_of(loaded)["image"]["fill_color"] == 0
    loaded.model.visual.preprocess_cfg |= {"resize_mode": "longest", "fill_color": 255}
    assert settings_of(loaded)["image"]["fill_color"] == 255


def test_tokenizers_of_open_clips_own_models_are_written_too(tmp_path):
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    clips = SimpleTokenizer(context_length=12)
    module.write_tokenizer(clips, tmp_path / "clip")
    assert torch.equal(load_tokenizer(tmp_path / "clip")(CAPTIONS), clips(CAPTIONS))

    write_tokenizer(tmp_path / "bert")
    berts = HFTokenizer(str(tmp_path / "bert"), 12, clean="canonicalize")
    module.write_tokenizer(berts, tmp_path / "written")
    again = load_tokenizer(tmp_path / "written", context_length=12)
    assert torch.equal(again(CAPTIONS), berts(CAPTIONS))
    # What the files cannot say, and SigLIP needs, is told beside them.
    assert not torch.equal(again(["a red, dog"]), berts(["a red, dog"]))
    assert module.cleaning_of(berts) == "canonicalize"


DEMO = {"image_size": 64, "timm_model_name": "softmoe_vit_demo_patch8_64", "timm_pool": "avg", "timm_proj": ""}


def soft_in_timm(folder, tokenizer):
    return new_model(
        folder,
        tokenizer,
        DEMO,
        TEXT | {"softmoe_text": {"padding": "mask", "pool": "map"}},
        text_moe=MoEConfig(num_experts=3),
        init_logit_bias=-10.0,
    )


def soft_in_native(folder, tokenizer):
    moe = MoEConfig(num_experts=3, slots_per_expert=2)
    return new_model(folder, tokenizer, text=TEXT | {"softmoe_text": {}}, image_moe=moe, text_moe=moe)


def dense_with_clips_tokenizer(folder, tokenizer):
    return new_model(folder, open_clip_tokenizer(12))


def bert(folder, tokenizer):
    write_bert(folder / "bert")
    tower = {"hf_model_name": str(folder / "bert"), "hf_tokenizer_name": str(folder / "bert")}
    tokenizer = TransformersTokenizer(folder / "bert", 10)
    return new_model(folder, tokenizer, text=tower | {"hf_proj_type": "linear", "context_length": 10})


@pytest.mark.slow
@pytest.mark.parametrize("make", [soft_in_timm, soft_in_native, dense_with_clips_tokenizer, bert])
def test_an_exported_folder_computes_what_the_model_computes(make, tokenizer, softmoe_clip, tmp_path):
    import onnx

    loaded = make(tmp_path, tokenizer)
    save(loaded, tmp_path / "model")
    done = softmoe_clip("export-onnx", tmp_path / "model", tmp_path / "out")
    assert done.returncode == 0, done
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert "out: onnxruntime and torch differ by at most " in done.stdout
    shutil.rmtree(tmp_path / "model")
    folder = (tmp_path / "out").rename(tmp_path / "moved")

    size = loaded.image_size
    token_ids = load_tokenizer(folder)(CAPTIONS)
    assert torch.equal(token_ids, loaded.tokenizer(CAPTIONS))
    for tower, inputs in (("image", torch.randn(5, 3, size, size)), ("text", token_ids)):
        onnx.checker.check_model(folder / f"{tower}.onnx", full_check=True)
        with torch.inference_mode():
            expected = UnitVectors(loaded.model, tower)(inputs)
        for batch in (1, 2, 5):
            found = run(folder / f"{tower}.onnx", inputs[:batch])
            assert found.dtype == np.float32
            torch.testing.assert_close(torch.from_numpy(found), expected[:batch], rtol=0, atol=1e-4)
        assert expected.std(0).min() > 1e-3  # inputs do matter

    told = json.loads((folder / "softmoe_onnx.json").read_text())
    assert {name: told["image"][name] for name in module.PREPROCESSING} == {
        "size": [size, size],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    assert told["text"]["context_length"] == token_ids.shape[1]
    assert told["logit_scale"] == pytest.approx(loaded.model.logit_scale.exp().item())
    assert told["logit_bias"] == (None if loaded.model.logit_bias is None else loaded.model.logit_bias.item())


ROUTERS = {
    "soft_uniform": {},
    "uniform_soft": {},
    "uniform": {},
    "identity": {"slots_per_expert": 6},
    "tokens_choice": {"capacity_multiple_of": 1, "top_k": 2, "bpr": True},
    "experts_choice": {"capacity_multiple_of": 1},
    "hash": {},
    "sinkhorn": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_exported(router, tokenizer, tmp_path, capfd):
    moe = MoEConfig(router=router, num_experts=3, **ROUTERS[router])
    tower = UnitVectors(new_model(tmp_path, tokenizer, image_moe=moe).model, "image").eval()
    write_tower(tower, torch.randn(2, 3, 32, 32), tmp_path / "image.onnx")
    assert difference(tower, torch.randn(7, 3, 32, 32), tmp_path / "image.onnx") < 1e-5
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_maps_pooling_and_fixed_positions_are_exported(tokenizer, tmp_path):
    loaded = new_model(tmp_path, tokenizer, DEMO)
    trunk = timm.create_model(
        "softmoe_vit_demo_patch8_64", global_pool="map", pos_embed="sincos2d", num_classes=16
    ).eval()
    move(trunk)
    loaded.model.visual.trunk = trunk
    tower = UnitVectors(loaded.model, "image").eval()
    write_tower(tower, torch.randn(2, 3, 64, 64), tmp_path / "image.onnx")
    assert difference(tower, torch.randn(3, 3, 64, 64), tmp_path / "image.onnx") < 1e-5


def softmax_over_the_wrong_axes(self, tokens, mask=None):
    logits = self.logits(tokens)
    return Routing(*(logits.softmax(dim).unflatten(2, self.slots) for dim in (2, 1)))


def other_activation(experts):
    experts.activation = "quick_gelu"


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_refused_and_removed(tokenizer, tmp_path, monkeypatch):
    loaded = new_model(tmp_path, tokenizer, image_moe=MoEConfig(num_experts=3))
    monkeypatch.setattr(module, "load", lambda model: loaded)
    tower = UnitVectors(loaded.model, "image").eval()
    write_tower(tower, torch.randn(2, 3, 32, 32), tmp_path / "image.onnx")
    with monkeypatch.context() as changed:
        changed.setattr(SoftMoE, "route", softmax_over_the_wrong_axes)
        with pytest.raises(
            ValueError, match=r"embeddings from the image tower differ from torch's by .*, more than 1e-04"
        ):
            difference(tower, torch.randn(3, 3, 32, 32), tmp_path / "image.onnx")
        # The same, where the exporter goes wrong.
        changed.setattr(module, "write_tower", lambda *_: shutil.copy(tmp_path / "image.onnx", _[2]))
        with pytest.raises(ValueError, match="nothing was written"):
            export_onnx("model", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Tiny.json", "image.onnx"]
    other_activation(loaded.model.visual.transformer.resblocks[1].mlp.experts)
    with pytest.raises(ValueError, match="differ"):
        difference(tower, torch.randn(3, 3, 32, 32), tmp_path / "image.onnx")


@pytest.mark.slow
def test_weights_too_large_for_one_file_lie_beside_it_and_move_with_it(tokenizer, tmp_path, monkeypatch):
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)  # instead of 2 GB
    tower = UnitVectors(new_model(tmp_path, tokenizer).model, "image").eval()
    (tmp_path / "out").mkdir()
    write_tower(tower, torch.randn(2, 3, 32, 32), tmp_path / "out/image.onnx")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["image.onnx", "image.onnx.data"]
    (tmp_path / "out").rename(tmp_path / "moved")
    assert difference(tower, torch.randn(3, 3, 32, 32), tmp_path / "moved/image.onnx") < 1e-5


@pytest.mark.slow
def test_what_the_exporter_cannot_translate_is_one_sentence(tokenizer, tmp_path):
    class Untranslatable(torch.nn.Module):
        def forward(self, pixels):
            return torch.linalg.eigvals(pixels[:, 0]).real

    loaded = new_model(tmp_path, tokenizer)
    loaded.model.visual.forward = Untranslatable().forward
    with pytest.raises(ValueError, match="the image tower cannot be written as ONNX: ") as error:
        write_tower(UnitVectors(loaded.model, "image").eval(), torch.randn(2, 3, 32, 32), tmp_path / "image.onnx")
    assert "\n" not in str(error.value)
