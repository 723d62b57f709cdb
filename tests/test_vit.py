"""The registered towers: sizes, parity with the reference, initialisation, cost."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import LayerNorm

import softmoe_clip.plugin
from softmoe_clip.config import MoEConfig
from softmoe_clip.models.complexity import image_complexity, mlp_macs, num_parameters, soft_moe_macs
from softmoe_clip.models.vit import SIZES, TOWERS, ReferenceViT

GOLDEN = Path(__file__).parent / "golden"


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


def golden_tower(case):
    """Build the reference's tower of a golden file, and fill it with the file's parameters."""
    config = json.loads(str(case["meta"]))["config"]
    encoder, p = config["encoder"], {k[6:]: torch.from_numpy(v).double() for k, v in case.items() if k[:6] == "param:"}
    moe = encoder["moe"]
    experts = case["param:Encoder/encoderblock_1/Moe/Router/mu"].shape[1:] if moe["layers"] else None
    tower = ReferenceViT(
        img_size=16,
        patch_size=4,
        num_classes=config["num_classes"],
        global_pool="avg",
        fc_norm=False,
        class_token=False,
        embed_dim=config["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_ratio=encoder["mlp_dim"] / config["hidden_size"],
        qk_norm=True,
        norm_layer=partial(LayerNorm, eps=1e-6),
        act_layer="gelu_tanh",
        moe=MoEConfig(layers=moe["layers"], num_experts=experts[0], slots_per_expert=experts[1]) if experts else None,
    ).double()
    d, state = config["hidden_size"], {}
    state["patch_embed.proj.weight"] = p["embedding/kernel"].permute(3, 2, 0, 1)
    state["patch_embed.proj.bias"] = p["embedding/bias"]
    positions = "Encoder/posembed_input/pos_embedding"
    state["pos_embed"] = p[positions] if positions in p else sincos(4, d)
    state["norm.weight"], state["norm.bias"] = p["Encoder/encoder_norm/scale"], p["Encoder/encoder_norm/bias"]
    state["head.weight"], state["head.bias"] = p["head/kernel"].T, p["head/bias"]
    for i in range(encoder["num_layers"]):
        theirs, ours = f"Encoder/encoderblock_{i}/", f"blocks.{i}."
        for j in (0, 1):
            state[f"{ours}norm{j + 1}.weight"] = p[f"{theirs}LayerNorm_{j}/scale"]
            state[f"{ours}norm{j + 1}.bias"] = p[f"{theirs}LayerNorm_{j}/bias"]
        attention, qkv = f"{theirs}SelfAttention/", ("query", "key", "value")
        state[f"{ours}attn.qkv.weight"] = torch.cat([p[f"{attention}{x}/kernel"].reshape(d, d).T for x in qkv])
        state[f"{ours}attn.qkv.bias"] = torch.cat([p[f"{attention}{x}/bias"].flatten() for x in qkv])
        state[f"{ours}attn.q_norm.weight"] = p[f"{attention}query_ln/scale"]
        state[f"{ours}attn.k_norm.weight"] = p[f"{attention}key_ln/scale"]
        state[f"{ours}attn.proj.weight"] = p[f"{attention}out/kernel"].reshape(d, d).T
        state[f"{ours}attn.proj.bias"] = p[f"{attention}out/bias"]
        if i in moe["layers"]:
            state[f"{ours}mlp.slot_embed"] = p[f"{theirs}Moe/Router/mu"]
            state[f"{ours}mlp.router_scale"] = p[f"{theirs}Moe/Router/scale"]
            for j, side in enumerate(("in", "out")):
                state[f"{ours}mlp.experts.w_{side}"] = p[f"{theirs}Moe/Mlp/Dense_{j}/kernel"]
                state[f"{ours}mlp.experts.b_{side}"] = p[f"{theirs}Moe/Mlp/Dense_{j}/bias"]
        else:
            for j in (0, 1):
                state[f"{ours}mlp.fc{j + 1}.weight"] = p[f"{theirs}Mlp/Dense_{j}/kernel"].T
                state[f"{ours}mlp.fc{j + 1}.bias"] = p[f"{theirs}Mlp/Dense_{j}/bias"]
    tower.load_state_dict(state)
    return tower


def sincos(side, width):
    """The reference's fixed positions: [sin x, cos x, sin y, cos y]."""
    y, x = np.mgrid[:side, :side]
    omega = 10_000 ** -(np.arange(width // 4) / (width // 4 - 1))
    table = [f(np.outer(axis.flatten(), omega)) for axis in (x, y) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(table, axis=1))[None]


@pytest.mark.parametrize("name", ["vit_soft_gap_qknorm", "vit_dense_gap_sincos"])
def test_whole_towers_equal_the_reference(name):
    case = dict(np.load(GOLDEN / f"{name}.npz"))
    tower, found = golden_tower(case), {}
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
