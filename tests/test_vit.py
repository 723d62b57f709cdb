"""The registered towers: sizes, initialisation, cost. Their outputs are compared in test_vit_golden.py."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import softmoe_clip.plugin
from softmoe_clip.models.complexity import image_complexity, num_parameters
from softmoe_clip.models.positions import sincos2d
from softmoe_clip.models.vit import SIZES, TOWERS


def meta_tower(name, **overrides):
    with torch.device("meta"):
        return timm.create_model(name, **({"num_classes": 0} | overrides))


# Parameters in millions (the reference's count), forward GFLOP per image (paper, Table 8), both with a head of 29,593
# classes; 0.6 % and the rounding of one printed digit apart.
TABLE_8 = {
    "PlainViT-S-16": (33.1, 9.2),
    "SoftMoE-S-16": (933.7, 8.6),
    "SoftMoE-S-14": (1841, 13.2),
    "PlainViT-B-16": (108.6, 35.1),
    "SoftMoE-B-16": (3708, 32.0),
    "PlainViT-L-16": (333.6, 122.9),
    "SoftMoE-L-16": (13127, 111.1),
    "PlainViT-H-14": (668.7, 334.2),
    "SoftMoE-H-14-e128": (27320, 284.6),
    "SoftMoE-H-14": (54180, 342.4),
}


@pytest.mark.parametrize("name", TABLE_8)
def test_sizes_and_costs_are_those_of_the_paper(name):
    millions, gflop = TABLE_8[name]
    config = json.loads((softmoe_clip.plugin.MODEL_CONFIGS / f"{name}.json").read_text())
    tower = meta_tower(config["vision_cfg"]["timm_model_name"], num_classes=29_593)
    cost = image_complexity(tower, config["vision_cfg"]["image_size"])
    assert cost.num_parameters / 1e6 == pytest.approx(millions, rel=0.0003, abs=0.06)
    assert cost.flops / 1e9 == pytest.approx(gflop, rel=0.006, abs=0.05)


def soft_moe_macs(num_tokens, width, hidden, num_slots):
    """Logits, dispatch and combine, then the experts."""
    return 3 * num_tokens * num_slots * width + 2 * num_slots * width * hidden


def mlp_macs(num_tokens, width, hidden):
    return 2 * num_tokens * width * hidden


@pytest.mark.parametrize("name", ["softmoe_vit_demo_patch8_64", "plain_vit_demo_patch8_64"])
def test_counted_macs_equal_the_formulas(name):
    tower = next(tower for tower in TOWERS if tower.size == "demo")
    d, depth, f, _ = SIZES["demo"]
    n, num_slots = (64 // tower.patch) ** 2, tower.num_experts * tower.slots_per_expert
    attention = 4 * n * d * d + 2 * n * n * d
    second_half = soft_moe_macs(n, d, f, num_slots) if name.startswith("softmoe") else mlp_macs(n, d, f)
    embedding = n * d * 3 * tower.patch**2
    expected = embedding + depth * attention + depth // 2 * (mlp_macs(n, d, f) + second_half)
    assert image_complexity(timm.create_model(name, num_classes=0), 64).macs == expected


def test_the_demo_towers_cost_the_same_within_5_percent():
    soft, dense = (image_complexity(meta_tower(f"{kind}_vit_demo_patch8_64"), 64) for kind in ("softmoe", "plain"))
    assert soft.macs == pytest.approx(dense.macs, rel=0.05)
    assert soft.num_parameters > 3 * dense.num_parameters


def test_counting_leaves_the_model_as_it_was():
    tower = timm.create_model("softmoe_vit_demo_patch8_64", num_classes=0)
    image_complexity(tower, 64)
    assert {p.device.type for p in tower.parameters()} == {"cpu"}
    assert num_parameters(tower) == sum(p.numel() for p in tower.parameters())


@pytest.mark.parametrize("name", softmoe_clip.plugin.TIMM_NAMES)
def test_every_registered_name_builds_for_its_picture_size(name):
    size = int(name.rsplit("_", 1)[1])
    tower = meta_tower(name)
    assert tower.patch_embed.img_size == (size, size)
    assert tower.pretrained_cfg["input_size"] == (3, size, size)
    assert tower(torch.empty(1, 3, size, size, device="meta")).shape == (1, tower.num_features)


def test_towers_start_as_in_the_reference():
    torch.manual_seed(0)
    tower = timm.create_model("softmoe_vit_demo_patch8_64", num_classes=0)
    d, f = SIZES["demo"].width, SIZES["demo"].hidden
    attention, mlp = tower.blocks[0].attn, tower.blocks[0].mlp
    fan_in = tower.patch_embed.proj.weight[0].numel()
    spreads = {
        tower.pos_embed: 0.02,
        tower.patch_embed.proj.weight: fan_in**-0.5,
        attention.qkv.weight: d**-0.5,  # xavier_uniform of (d, d): variance 2 / (d + d)
        attention.proj.weight: d**-0.5,
        mlp.fc1.weight: (2 / (d + f)) ** 0.5,
        mlp.fc2.weight: (2 / (d + f)) ** 0.5,
        mlp.fc1.bias: 1e-6,
        tower.blocks[-1].mlp.slot_embed: (d * tower.blocks[-1].mlp.slot_embed.shape[1]) ** -0.5,
    }
    for parameter, std in spreads.items():
        assert parameter.std().item() == pytest.approx(std, rel=5 / parameter.numel() ** 0.5)
    assert tower.patch_embed.proj.weight.abs().max() <= 2.0001 * fan_in**-0.5 / 0.8796
    assert not any((attention.qkv.bias.any(), attention.proj.bias.any(), tower.patch_embed.proj.bias.any()))
    assert not any("q_norm.bias" in name or "k_norm.bias" in name for name in tower.state_dict())


@pytest.mark.parametrize("setting", [{"qkv_bias": False}, {"proj_bias": False}, {"pre_norm": True}], ids=str)
def test_towers_without_the_biases_that_timm_can_leave_out_start_as_others_do(setting):
    tower = timm.create_model("softmoe_vit_demo_patch8_64", **setting)
    weight = tower.blocks[0].attn.proj.weight
    assert weight.std().item() == pytest.approx(weight.shape[0] ** -0.5, rel=0.05)
    assert tower(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_timm_optimizers_leave_slots_scales_and_positions_undecayed():
    tower = timm.create_model("softmoe_vit_demo_patch8_64", num_classes=0)
    free = tower.no_weight_decay()
    assert {"pos_embed", "blocks.3.mlp.slot_embed", "blocks.3.mlp.router_scale", "blocks.3.mlp.experts.b_in"} <= free
    assert "blocks.3.mlp.experts.w_in" not in free


def test_a_tower_takes_another_resolution_with_the_same_slots():
    tower = timm.create_model("softmoe_vit_demo_patch8_64", num_classes=0)
    tower.set_input_size(96)
    assert tower(torch.randn(1, 3, 96, 96)).shape == (1, SIZES["demo"].width)


def test_a_tower_gives_what_its_blocks_give_and_takes_weights_of_another_resolution(tmp_path):
    tower = timm.create_model("softmoe_vit_demo_patch8_64", num_classes=0).eval()
    images = torch.randn(1, 3, 64, 64)
    blocks = timm.create_model("softmoe_vit_demo_patch8_64", features_only=True, out_indices=[1, 3]).eval()
    blocks.model.load_state_dict(tower.state_dict(), strict=False)
    found = blocks(images)
    assert [feature.shape for feature in found] == [(1, 128, 8, 8)] * 2
    expected = tower.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
    for feature, other in zip(found, expected, strict=True):
        torch.testing.assert_close(feature, other)
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    file = {"file": str(tmp_path / "tower.safetensors")}
    large = timm.create_model(
        "softmoe_vit_demo_patch8_64", pretrained=True, pretrained_cfg_overlay=file, img_size=96, num_classes=0
    )
    torch.testing.assert_close(large.pos_embed, resample_abs_pos_embed(tower.pos_embed, [12, 12], num_prefix_tokens=0))
    assert torch.equal(large.blocks[3].mlp.slot_embed, tower.blocks[3].mlp.slot_embed)


@pytest.mark.parametrize(("weights", "patches", "stream"), [("float32", "bfloat16", "float32"), *[["bfloat16"] * 3]])
def test_fixed_positions_are_as_exact_as_the_weights_whatever_autocast_makes_of_the_patches(weights, patches, stream):
    tower = timm.create_model("plain_vit_demo_patch8_64", num_classes=0, pos_embed="sincos2d")
    tower.to(getattr(torch, weights))
    tokens = tower._pos_embed(torch.zeros(1, 64, 128, dtype=getattr(torch, patches)))
    assert tokens.dtype == getattr(torch, stream)
    assert torch.equal(tokens[0], sincos2d(8, 8, 128, tokens.dtype))


def test_a_tower_with_fixed_positions_takes_another_resolution_and_learns_no_positions():
    tower = timm.create_model("plain_vit_demo_patch8_64", num_classes=0, pos_embed="sincos2d")
    assert tower.pos_embed is None
    tower.set_input_size(96)
    assert tower(torch.randn(1, 3, 96, 96)).shape == (1, SIZES["demo"].width)
    flexible = timm.create_model("plain_vit_demo_patch8_64", num_classes=0, pos_embed="sincos2d", dynamic_img_size=True)
    flexible.load_state_dict(tower.state_dict())
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(flexible(images), tower(images))


def test_positions_are_added_to_patches_and_not_to_a_class_token():
    tower = timm.create_model("plain_vit_demo_patch8_64", num_classes=0, pos_embed="sincos2d", class_token=True)
    tokens = torch.zeros(1, 64, SIZES["demo"].width)
    assert not tower._pos_embed(tokens)[0, 0].sub(tower.cls_token[0, 0]).any()
    assert tower._pos_embed(tokens)[0, 1:].any(1).all()


def test_the_attention_pool_starts_as_in_the_reference():
    torch.manual_seed(0)
    pool = timm.create_model("plain_vit_demo_patch8_64", num_classes=0, global_pool="map").attn_pool
    d = SIZES["demo"].width
    bound = (6 / (1 + d)) ** 0.5  # xavier_uniform of (1, 1, d)
    assert 0.95 * bound < pool.latent.abs().max() <= bound
    for weight in (pool.q.weight, pool.kv.weight, pool.proj.weight):
        assert weight.std().item() == pytest.approx(d**-0.5, rel=0.03)
    assert not any(linear.bias.any() for linear in (pool.q, pool.kv, pool.proj))
    assert pool.mlp.fc1.bias.std().item() == pytest.approx(1e-6, rel=0.3)
    assert pool.norm.eps == pool.q_norm.eps == 1e-6
    assert pool.q_norm.bias is None


def test_another_activation_is_that_of_the_experts_too():
    tower = timm.create_model("softmoe_vit_demo_patch8_64", act_layer="quick_gelu")
    assert type(tower.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert tower.blocks[3].mlp.experts.activation == "quick_gelu"
    with pytest.raises(ValueError, match="experts have no activation 'silu': take gelu_tanh, gelu, quick_gelu"):
        timm.create_model("softmoe_vit_demo_patch8_64", act_layer="silu")
    assert timm.create_model("plain_vit_demo_patch8_64", act_layer="silu")
