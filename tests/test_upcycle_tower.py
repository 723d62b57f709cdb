"""Experts that start as a tower's MLPs: in `copy` and `noise` they are those MLPs, `shared` keeps the function."""

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, VisionTransformer

import softmoe_clip.plugin  # noqa: F401
from softmoe_clip.config import MoEConfig
from softmoe_clip.moe.install import tower_blocks
from softmoe_clip.moe.shared import SharedExpert
from softmoe_clip.moe.upcycle import NOISE, upcycle_tower

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


def test_an_activation_that_experts_have_not_is_refused_before_anything_changes():
    tower = timm.create_model("vit_tiny_patch16_224", **TIMM, act_layer="silu")
    before = [block.mlp for block in tower.blocks]
    with pytest.raises(ValueError, match="block 2 has the activation SiLU, and experts have only gelu_tanh, gelu"):
        upcycle_tower(tower, MoEConfig(num_experts=2))
    assert [block.mlp for block in tower.blocks] == before
