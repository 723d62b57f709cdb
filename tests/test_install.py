"""Soft MoE layers in the towers of timm and open_clip."""

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer

import softmoe_clip.plugin  # noqa: F401
from softmoe_clip.config import MoEConfig
from softmoe_clip.models.text import TextTower
from softmoe_clip.moe import SoftMoE, collect_routing, install

SMALL = MoEConfig(num_experts=3, slots_per_expert=2)


def timm_tower(**overrides):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | overrides))


def native_tower():
    return VisionTransformer(image_size=32, patch_size=8, width=24, layers=4, heads=2, mlp_ratio=2.0, output_dim=16)


def wrapped_tower():
    return TimmModel("plain_vit_demo_patch8_64", embed_dim=64, image_size=64, proj="none")


def mlps(tower):
    trunk = getattr(tower, "trunk", tower)
    return [block.mlp for block in (trunk.blocks if hasattr(trunk, "blocks") else trunk.transformer.resblocks)]


TOWERS = {"timm": timm_tower, "native": native_tower, "wrapped": wrapped_tower}


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS)
def test_the_last_half_gets_experts_of_the_same_hidden_size(make):
    tower = make()
    dense = mlps(tower)
    install(tower, SMALL)
    half = len(dense) // 2
    assert mlps(tower)[:half] == dense[:half]
    hidden = next(layer for layer in dense[0].children() if isinstance(layer, torch.nn.Linear)).out_features
    for layer in mlps(tower)[half:]:
        assert isinstance(layer, SoftMoE)
        assert layer.experts.w_in.shape == (3, layer.slot_embed.shape[0], hidden)
        assert layer.slot_embed.shape[1:] == (3, 2)


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS)
def test_a_tower_with_experts_runs_learns_and_reports_by_block(make):
    torch.manual_seed(0)
    tower = make()
    size = 64 if make is wrapped_tower else 32
    install(tower, MoEConfig(layers=[1, 3], num_experts=3))
    with collect_routing() as collected:
        out = tower(torch.randn(2, 3, size, size))
    out.square().sum().backward()
    assert list(collected.means()) == ["image/block_1", "image/block_3"]
    for layer in (mlps(tower)[i] for i in (1, 3)):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS)
def test_gradient_checkpointing_gives_the_same_gradients(make):
    torch.manual_seed(0)
    tower = make()
    install(tower, SMALL)
    images = torch.randn(2, 3, *([64, 64] if make is wrapped_tower else [32, 32]))
    gradients = []
    for enable in (False, True):
        tower.set_grad_checkpointing(enable)
        tower.zero_grad()
        tower(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients)


def test_the_class_token_takes_part_in_the_routing():
    tower = timm_tower()
    install(tower, MoEConfig(layers=[3], num_experts=3))
    shapes = []
    tower.blocks[3].mlp.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    tower(torch.randn(2, 3, 32, 32))
    assert shapes == [(2, 17, 24)]


def test_layers_take_the_dtype_and_mode_of_the_tower():
    tower = timm_tower().double().eval()
    install(tower, SMALL)
    assert not tower.blocks[3].mlp.training
    assert {p.dtype for p in tower.parameters()} == {torch.float64}


def test_open_clip_finds_the_dtype_of_a_tower_that_starts_with_experts():
    tower = native_tower()
    install(tower, MoEConfig(layers=[0], num_experts=2))
    assert tower.transformer.get_cast_dtype() == torch.float32
    assert not any("c_fc" in name for name in mlps(tower)[0].state_dict())


@pytest.mark.parametrize("layers", [[4], [-1], [0, 9], []])
def test_wrong_block_numbers_are_refused_with_the_right_range(layers):
    tower = timm_tower()
    with pytest.raises(ValueError, match="blocks are 0 to 3"):
        install(tower, MoEConfig(layers=layers))
    assert not any(isinstance(mlp, SoftMoE) for mlp in mlps(tower))


def test_unsupported_towers_are_refused_by_name():
    for tower, name in [
        (timm.create_model("resnet18"), "ResNet"),
        (timm.create_model("mixer_s32_224"), "MlpMixer"),
        (TextTransformer(context_length=8, vocab_size=10, width=16, heads=2, layers=2), "TextTransformer"),
    ]:
        with pytest.raises(ValueError, match=f"into a {name}"):
            install(tower, SMALL)


def test_an_mlp_that_is_more_than_two_layers_is_refused_before_anything_changes():
    tower = timm_tower(mlp_layer=timm.layers.SwiGLU)
    before = mlps(tower)
    with pytest.raises(ValueError, match="SwiGLU of block 2"):
        install(tower, SMALL)
    assert mlps(tower) == before


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"mlp_layer": timm.layers.GluMlp}, r"the GluMlp of block 2 is not a plain two-layer MLP"),
        ({"mlp_layer": timm.layers.SwiGLU}, r"the SwiGLU of block 2 is not a plain two-layer MLP"),
        ({"proj_drop_rate": 0.5}, r"the MLP of block 2 drops out \(p=0\.5\), which experts do not"),
    ],
)
def test_gates_and_dropout_that_experts_have_not_are_refused(overrides, told):
    with pytest.raises(ValueError, match=told):
        install(timm_tower(**overrides), SMALL)


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "tnt_s_legacy_patch16_224", "hiera_tiny_224"])
def test_towers_whose_tokens_are_of_another_kind_are_refused(name):
    with torch.device("meta"):
        tower = timm.create_model(name)
    with pytest.raises(ValueError, match="cannot put MoE layers into a"):
        install(tower, SMALL)


def test_installing_twice_is_refused():
    tower = timm_tower()
    install(tower, SMALL)
    with pytest.raises(ValueError, match="block 3 holds a Soft MoE layer already"):
        install(tower, MoEConfig(layers=[3]))


@pytest.mark.parametrize("sizes", [{"num_experts": 10**12}, {"num_experts": 2, "slots_per_expert": 10**13}])
def test_what_no_memory_holds_is_refused_before_anything_changes(sizes):
    tower = timm_tower()
    before = mlps(tower)
    with pytest.raises(
        ValueError, match=r"2 MoE layers of .* experts with .* slots each need .* GiB, this machine has"
    ):
        install(tower, MoEConfig(**sizes))
    assert mlps(tower) == before


def test_the_need_for_memory_is_that_of_the_layers_parameters(monkeypatch):
    layer = SoftMoE(24, 3, 2, hidden=96)
    need = 2 * 4 * (sum(p.numel() for p in layer.parameters()) - 1)  # the scale of 4 bytes is not worth counting
    monkeypatch.setattr("softmoe_clip.moe.memory.machine_memory", lambda: need)
    install(timm_tower(), SMALL)
    monkeypatch.setattr("softmoe_clip.moe.memory.machine_memory", lambda: need - 1)
    with pytest.raises(ValueError, match="this machine has"):
        install(timm_tower(), SMALL)
    with torch.device("meta"):
        install(timm_tower(), SMALL)


def test_slots_of_a_text_tower_are_counted_with_the_tokens_of_a_caption(monkeypatch):
    def tower():
        return TextTower(4, 10, 16, 2, 2, 24, 8)

    slots = 2 * 5_000
    need = 4 * slots * (4 + 16 + 24)
    monkeypatch.setattr("softmoe_clip.moe.memory.machine_memory", lambda: need)
    install(tower(), MoEConfig(num_experts=2, slots_per_expert=5_000))
    monkeypatch.setattr("softmoe_clip.moe.memory.machine_memory", lambda: need - 1)
    with pytest.raises(ValueError, match=r"the 10,000 slots of 2 experts need .* for one picture or caption"):
        install(tower(), MoEConfig(num_experts=2, slots_per_expert=5_000))
    with pytest.raises(ValueError, match="4 tokens"):
        install(tower(), MoEConfig(router="identity", num_experts=2))


def test_the_last_half_of_one_block_is_refused_where_it_would_be_none():
    tower = TextTower(4, 10, 16, 2, 1, 24, 8)
    with pytest.raises(ValueError, match=r"last half of 1 block is none: give the text tower's block as layers \[0\]"):
        install(tower, MoEConfig(num_experts=2))
