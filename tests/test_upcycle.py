"""Dense towers become Soft MoE towers: experts are the MLPs they replace, and what is left of the function is told."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer
from PIL import Image

import softmoe_clip.plugin  # noqa: F401
from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.data_pipelines.tokenizers import open_clip_tokenizer
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.models.upcycle import block_list, new_text_tower, upcycle, with_config
from softmoe_clip.moe.install import tower_blocks
from softmoe_clip.moe.shared import SharedExpert
from softmoe_clip.moe.upcycle import NOISE, upcycle_tower

NATIVE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 0}


def native(act_layer=torch.nn.GELU):
    return VisionTransformer(
        image_size=32, patch_size=8, width=24, layers=4, heads=2, mlp_ratio=2.0, output_dim=16, act_layer=act_layer
    )


TOWERS = {
    "native": (native, "gelu"),
    "native, QuickGELU": (lambda: native(QuickGELU), "quick_gelu"),
    "timm": (lambda: timm.create_model("vit_tiny_patch16_224", **TIMM), "gelu"),
    "timm, attention pool": (lambda: timm.create_model("vit_base_patch16_siglip_224", **TIMM), "gelu"),
    "timm in open_clip": (
        lambda: TimmModel("plain_vit_demo_patch8_64", embed_dim=128, image_size=64, proj="none"),
        "gelu_tanh",
    ),
}


def shake(module):
    """Move every parameter off its start, where biases are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


@pytest.fixture(params=TOWERS.values(), ids=TOWERS)
def tower(request):
    torch.manual_seed(0)
    make, activation = request.param
    tower = shake(make()).eval()
    tower.activation_name = activation
    return tower


def image_of(tower):
    return torch.randn(2, 3, *([64, 64] if isinstance(tower, TimmModel) else [32, 32]))


def test_every_copied_expert_computes_what_the_mlp_computed(tower):
    dense = [block.mlp for block in tower_blocks(tower)]
    config = upcycle_tower(tower, MoEConfig(num_experts=3, slots_per_expert=2))
    assert config.activation == tower.activation_name
    for block, mlp in list(zip(tower_blocks(tower), dense, strict=True))[2:]:
        slots = torch.randn(2, 3, 2, block.mlp.slot_embed.shape[0])
        torch.testing.assert_close(block.mlp.experts(slots), mlp(slots))


def test_a_shared_expert_keeps_what_the_tower_computes_and_lets_the_others_learn(tower):
    images = image_of(tower)
    before = tower(images)
    upcycle_tower(tower, MoEConfig(num_experts=3), "shared")
    assert torch.equal(tower(images), before)
    layers = [block.mlp for block in tower_blocks(tower)[2:]]
    assert all(isinstance(layer, SharedExpert) for layer in layers)
    optimizer = torch.optim.SGD(tower.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves w_out, the second all the rest
        optimizer.zero_grad()
        tower(images).square().sum().backward()
        optimizer.step()
    for layer in layers:
        assert all(p.grad.any() for p in layer.routed.parameters())
        assert layer.shared is not None


def test_noise_tells_experts_apart_by_a_share_of_their_spread():
    torch.manual_seed(0)
    towers = [timm.create_model("vit_tiny_patch16_224", **TIMM) for _ in range(2)]
    towers[1].load_state_dict(towers[0].state_dict())
    for one, mode in zip(towers, ("copy", "noise"), strict=True):
        upcycle_tower(one, MoEConfig(num_experts=4), mode)
    copied, noisy = (one.blocks[3].mlp.experts for one in towers)
    for name in ("w_in", "w_out"):
        same, moved = getattr(copied, name), getattr(noisy, name)
        share = (moved - same).std() / same[0].std()
        assert share.item() == pytest.approx(NOISE, rel=0.05)
        assert not torch.equal(moved[0] - same[0], moved[1] - same[1])


def test_with_uniform_weights_a_copy_gives_the_mlp_of_the_mean_token():
    torch.manual_seed(0)
    tower = timm.create_model("vit_tiny_patch16_224", **TIMM)
    mlp = tower.blocks[3].mlp
    upcycle_tower(tower, MoEConfig(layers=[3], num_experts=2))
    layer, tokens = tower.blocks[3].mlp, torch.randn(1, 17, 24)
    layer.router_scale.data.zero_()
    torch.testing.assert_close(layer(tokens), mlp(tokens.mean(1, keepdim=True)).expand_as(tokens))


@pytest.fixture(scope="module", params=["native", "timm"])
def source(request, tmp_path_factory):
    """A folder with a dense model."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "Native.json").write_text(json.dumps(NATIVE))
    config = ModelConfig(str(folder / "Native.json") if request.param == "native" else "PlainViT-demo")
    torch.manual_seed(0)
    sizes = (49408, 8)
    model = shake(create_model(config, *sizes)).eval()
    save(
        LoadedModel(model, open_clip_tokenizer(8), transform_of(model), folder_config(config, *sizes)), folder / "dense"
    )
    return folder / "dense"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def embeddings(loaded, pictures):
    images = torch.stack([loaded.transform(Image.open(file)) for file in sorted(pictures.iterdir())])
    with torch.inference_mode():
        return loaded.model.encode_image(images), loaded.model.encode_text(loaded.tokenizer(["a dog", "two cats"]))


@pytest.mark.parametrize("mode", ["copy", "noise", "shared"])
def test_the_folder_loads_and_gives_the_embeddings_that_were_compared(source, pictures, tmp_path, mode):
    done = upcycle(str(source), tmp_path / "out", 3, mode=mode, pictures=str(pictures))
    images, texts = embeddings(load(source), pictures)
    after = load(tmp_path / "out")
    images_after, texts_after = embeddings(after, pictures)
    assert torch.equal(texts, texts_after)
    cosines = torch.nn.functional.cosine_similarity(images.double(), images_after.double(), dim=-1)
    assert done.mean == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert done.least == pytest.approx(cosines.min().item(), abs=1e-6)
    assert done.measured_on == f"5 pictures of {pictures}"
    assert after.config["softmoe"]["image_moe"]["shared_expert"] == (mode == "shared")
    if mode == "shared":
        assert done.least >= 0.9999
    else:
        assert done.mean < 0.9999


def test_without_pictures_the_comparison_says_that_it_saw_noise(source, tmp_path):
    assert "random pixels" in upcycle(str(source), tmp_path / "out", 2, "3", "shared").measured_on


def test_shards_are_pictures_too(source, scenes, tmp_path):
    done = upcycle(str(source), tmp_path / "out", 2, [3], "shared", pictures=str(scenes / "val"))
    assert done.measured_on == f"40 pictures of {scenes / 'val'}"


def test_a_model_of_open_clips_brings_its_architecture_and_preprocessing(tmp_path):
    (tmp_path / "NativeQuick.json").write_text(json.dumps(NATIVE))
    open_clip.add_model_config(tmp_path)
    model = open_clip.CLIP(**NATIVE, quick_gelu=True)
    open_clip.set_model_preprocess_cfg(model, {"size": 32, "mode": "RGB", "mean": [0.4] * 3, "std": [0.3] * 3})
    config = with_config(LoadedModel(model, None, None, None), "NativeQuick:sometag").config
    assert config["model_cfg"] == NATIVE | {"quick_gelu": True}
    assert config["preprocess_cfg"] == {"mean": [0.4] * 3, "std": [0.3] * 3}


@pytest.mark.parametrize("layers", [[1, 3], "last_half"])
def test_layers_are_read_as_people_write_them(layers):
    assert block_list(layers) == layers
    assert block_list("6, 7,9-11") == [6, 7, 9, 10, 11]
    for wrong in ("", "last", "3-", "-1", "3;4"):
        with pytest.raises(ValueError, match="last_half or block numbers"):
            block_list(wrong)


def test_an_activation_that_experts_have_not_is_refused_before_anything_changes():
    tower = timm.create_model("vit_tiny_patch16_224", **TIMM, act_layer="silu")
    before = [block.mlp for block in tower.blocks]
    with pytest.raises(ValueError, match="block 2 has the activation SiLU, and experts have only gelu_tanh, gelu"):
        upcycle_tower(tower, MoEConfig(num_experts=2))
    assert [block.mlp for block in tower.blocks] == before


def test_upcycling_twice_is_refused_and_nothing_is_written(source, tmp_path):
    for mode in ("copy", "shared"):
        upcycle(str(source), tmp_path / mode, 2, [3], mode)
        with pytest.raises(ValueError, match="block 3 holds a Soft MoE layer already"):
            upcycle(str(tmp_path / mode), tmp_path / "twice", 2, [3])
    assert not (tmp_path / "twice").exists()


def test_the_verb_prints_the_cosine(softmoe_clip, source, pictures, tmp_path):
    done = softmoe_clip(
        *("upcycle", source, tmp_path / "out", "--num-experts", 2, "--mode", "shared", "--pictures", pictures)
    )
    assert done.returncode == 0, done
    assert "cosine: mean 1.0000, least 1.0000" in done.stdout
    assert f"on 5 pictures of {pictures}" in done.stdout


def test_a_vit_of_timms_gets_a_new_text_tower_and_keeps_its_pooling_and_preprocessing(tmp_path):
    loaded = new_text_tower("vit_tiny_patch16_224", pretrained=False)
    trunk = loaded.model.visual.trunk
    assert (trunk.global_pool, loaded.image_size) == ("token", 224)
    assert loaded.preprocess_cfg["mean"] == list(trunk.pretrained_cfg["mean"])
    picture = torch.randn(1, 3, 224, 224)
    expected = loaded.model.encode_image(picture)
    torch.testing.assert_close(expected, trunk.forward_head(trunk.forward_features(picture)))
    save(loaded, tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(again.model.encode_image(picture), expected)
    assert again.model.encode_text(again.tokenizer(["a dog"])).shape == (1, 192)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("timm:vit_tiny_patch16_242", "did you mean 'vit_tiny_patch16_224'"),
        ("timm:plain_vit_demo_patch8_64", "plain_vit_demo_patch8_64"),
    ],
)
def test_a_timm_name_without_weights_is_one_sentence(source, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        upcycle(source, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--num-experts", 0], "at least one expert"),
        (["--num-experts", 2, "--slots-per-expert", 0], "at least one expert and one slot"),
        (["--num-experts", 10**12], "this machine has"),
        (["--num-experts", 2, "--mode", "moove"], "copy, noise, shared"),
        (["--num-experts", 2, "--layers", "4"], "blocks are 0 to 3"),
        (["--num-experts", 2, "--layers", "a"], "6,7,9-11"),
        (["--num-experts", 2, "--pictures", "empty"], "no pictures and no shards in empty"),
        ([], "--num-experts"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(softmoe_clip, source, tmp_path, monkeypatch, options, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    done = softmoe_clip("upcycle", source, "out", *options)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
