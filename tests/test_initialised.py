"""Every number of a fresh model is drawn or set: none is what the memory happened to hold."""

import json
from contextlib import contextmanager

import pytest
import timm
import torch

import softmoe_clip.plugin
from softmoe_clip.config import ROUTER_SETTINGS, ModelConfig, MoEConfig
from softmoe_clip.models.create import create_model
from softmoe_clip.moe.install import install

ARCHITECTURES = sorted(
    file.stem
    for file in softmoe_clip.plugin.MODEL_CONFIGS.glob("*.json")
    if json.loads(file.read_text())["vision_cfg"].get("image_size", 224) <= 64
)


@contextmanager
def fresh_memory_is_nan():
    """Let torch fill what `torch.empty` gives with NaN, as its deterministic mode does."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_all_set(model):
    unset = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    assert not unset, unset


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_number_of_an_architecture_is_left_to_the_memory(arch):
    with fresh_memory_is_nan():
        assert_all_set(create_model(ModelConfig(arch=arch)))


@pytest.mark.parametrize(
    "options",
    [
        {"class_token": True},
        {"class_token": True, "reg_tokens": 3, "no_embed_class": True},
        {"pos_embed": "sincos2d"},
        {"global_pool": "map", "num_classes": 5},
        {"init_values": 0.1},
        {"qk_norm": False, "drop_path_rate": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["softmoe", "plain"])
def test_no_number_of_a_tower_is_left_to_the_memory(kind, options):
    with fresh_memory_is_nan():
        assert_all_set(timm.create_model(f"{kind}_vit_demo_patch8_64", **options))


def test_no_number_of_the_decoder_of_coca_is_left_to_the_memory(coca_file):
    with fresh_memory_is_nan():
        model = create_model(ModelConfig(arch=str(coca_file)))
    assert_all_set(model)
    projection = model.text_decoder.text_projection
    assert projection.std().item() == pytest.approx(projection.shape[0] ** -0.5, rel=0.1)


@pytest.mark.parametrize("router", ROUTER_SETTINGS)
def test_no_number_of_a_router_is_left_to_the_memory(router):
    with fresh_memory_is_nan():
        tower = timm.create_model("plain_vit_demo_patch8_64")
        install(tower, MoEConfig(layers=[1, 3], num_experts=64, router=router))
        assert_all_set(tower)
