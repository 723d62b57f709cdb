"""The registered towers: sizes, parity with the reference, initialisation, cost."""

import json

import numpy as np
import pytest
import timm
import torch
from golden_towers import golden_case, golden_vit

import softmoe_clip.plugin
from softmoe_clip.models.complexity import image_complexity, mlp_macs, num_parameters, soft_moe_macs
from softmoe_clip.models.vit import SIZES, TOWERS


def meta_tower(name, **overrides):
    with torch.device("meta"):
        return timm.create_model(name, **({"num_classes": 0} | overrides))


# Parameters in millions, forward GFLOP per image (paper, Table 8, which counts a head of 29,593 classes); 0.6 % and
# the rounding of one printed digit apart.
TABLE_8 = {
    "plain_vit_small_patch16_224": (33, 9.2),
    "softmoe_vit_small_patch16_224": (933, 8.6),
    "softmoe_vit_small_patch14_224": (1841, 13.2),
    "plain_vit_base_patch16_224": (108, 35.1),
    "softmoe_vit_base_patch16_224": (3708, 32.0),
    "plain_vit_large_patch16_224": (333, 122.9),
    "softmoe_vit_large_patch16_224": (13127, 111.1),
    "plain_vit_huge_patch14_224": (669, 334.2),
    "softmoe_vit_huge_patch14_224": (54180, 342.4),
}


@pytest.mark.parametrize("name", TABLE_8)
def test_sizes_and_costs_are_those_of_the_paper(name):
    millions, gflop = TABLE_8[name]
    cost = image_complexity(meta_tower(name, num_classes=29_593), 224)
    assert cost.num_parameters / 1e6 == pytest.approx(millions, rel=0.003, abs=0.6)
    assert cost.flops / 1e9 == pytest.approx(gflop, rel=0.006, abs=0.05)


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


@pytest.mark.parametrize("name", ["vit_soft_gap_qknorm", "vit_dense_gap_sincos"])
def test_whole_towers_equal_the_reference(name):
    case, params = golden_case(name)
    tower, found = golden_vit(json.loads(str(case["meta"]))["config"], params), {}
    for i, block in enumerate(tower.blocks):
        block.register_forward_hook(lambda m, inputs, out, i=i: found.update({f"act:encoderblock_{i}": out}))
    tower.norm.register_forward_hook(lambda m, inputs, out: found.update({"act:encoded": out}))
    image = torch.from_numpy(case["image"]).double().requires_grad_()
    found["logits"] = tower(image.permute(0, 3, 1, 2))
    (found["logits"] * torch.from_numpy(case["loss_cotangent"])).sum().backward()
    found["grad_image"] = image.grad
    for key, value in found.items():
        difference = np.abs(value.detach().numpy() - case[key]).max()
        assert difference <= 1e-10 * max(1, np.abs(case[key]).max()), key


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


def test_timm_optimizers_leave_slots_scales_and_positions_undecayed():
    tower = timm.create_model("softmoe_vit_demo_patch8_64", num_classes=0)
    free = tower.no_weight_decay()
    assert {"pos_embed", "blocks.3.mlp.slot_embed", "blocks.3.mlp.router_scale", "blocks.3.mlp.experts.b_in"} <= free
    assert "blocks.3.mlp.experts.w_in" not in free


def test_a_tower_takes_another_resolution_with_the_same_slots():
    tower = timm.create_model("softmoe_vit_demo_patch8_64", num_classes=0)
    tower.set_input_size(96)
    assert tower(torch.randn(1, 3, 96, 96)).shape == (1, SIZES["demo"].width)
