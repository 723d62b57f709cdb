"""New two-tower models: from our architectures, open_clip's, and JSON files."""

import json
import math

import pytest
import timm
import torch

import softmoe_clip.plugin
from softmoe_clip.config import ModelConfig, MoEConfig
from softmoe_clip.models.complexity import text_complexity
from softmoe_clip.models.create import (
    NEW_MODEL_PREPROCESS,
    architecture,
    build,
    create_model,
    folder_config,
    read_architecture,
)
from softmoe_clip.models.written import check_written
from softmoe_clip.moe import SoftMoE


@pytest.fixture(scope="module")
def demo():
    return create_model(ModelConfig("SoftMoE-demo", init_logit_scale=math.log(10), init_logit_bias=-10.0), 300, 12)


WIDTH, TEXT = (read_architecture("SoftMoE-demo")[key] for key in ("embed_dim", "text_cfg"))


def test_the_demo_model_gives_features_scale_and_bias(demo):
    out = demo(torch.randn(2, 3, 64, 64), torch.randint(300, (2, 12)))
    assert out["image_features"].shape == out["text_features"].shape == (2, WIDTH)
    assert out["logit_scale"].item() == pytest.approx(10)
    assert out["logit_bias"].item() == -10


def test_the_tokenizer_sets_vocabulary_and_context_length(demo):
    assert demo.text.token_embedding.weight.shape == (300, TEXT["width"])
    assert demo.text.positional_embedding.shape == (12, TEXT["width"])


def test_a_context_length_wins_over_that_of_the_architecture():
    assert architecture(ModelConfig("SoftMoE-demo", context_length=56))["text_cfg"] == TEXT | {"context_length": 56}
    assert architecture(ModelConfig("SoftMoE-demo"))["text_cfg"] == TEXT


def test_the_image_embedding_is_the_mean_of_the_normalised_tokens(demo):
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(demo.encode_image(images), demo.visual.trunk.forward_features(images).mean(1))


def test_the_text_tower_is_bidirectional_and_pools_the_last_position(demo):
    token_ids = torch.randint(300, (1, 12))
    changed = token_ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 300
    assert not torch.allclose(demo.encode_text(token_ids), demo.encode_text(changed))
    assert demo.text.attn_mask is None
    assert {block.ln_1.eps for block in demo.text.transformer.resblocks} == {1e-6}
    assert demo.text.transformer.resblocks[0].mlp.gelu.approximate == "tanh"


def test_the_bias_of_the_text_towers_qk_norm_is_zero_and_frozen(demo):
    biases = [p for name, p in demo.named_parameters() if name.endswith(("ln_q.bias", "ln_k.bias"))]
    assert len(biases) == 2 * TEXT["layers"]
    assert not any(bias.any() or bias.requires_grad for bias in biases)
    assert sum(not p.requires_grad for p in demo.parameters()) == len(biases)


def test_without_a_bias_the_model_is_as_open_clip_starts_it():
    model = create_model(ModelConfig("PlainViT-demo"))
    assert model.logit_bias is None
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_soft_moe_goes_into_the_native_vit_of_an_open_clip_json(tmp_path):
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 4, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    path = tmp_path / "Small.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    config = ModelConfig(str(path), MoEConfig(layers=[2, 3], num_experts=4))
    model = create_model(config)
    assert [isinstance(block.mlp, SoftMoE) for block in model.visual.transformer.resblocks] == [
        False,
        False,
        True,
        True,
    ]
    assert folder_config(config)["softmoe"]["image_moe"]["layers"] == [2, 3]
    assert model(torch.randn(2, 3, 32, 32), torch.randint(20, (2, 8)))["image_features"].shape == (2, 16)


def test_a_quick_start_has_sharp_routers_quiet_blocks_and_positions_told_apart(demo):
    assert {p.item() for name, p in demo.named_parameters() if name.endswith("router_scale")} == {1.0}
    quick = create_model(ModelConfig("SoftMoE-demo", start="quick"))
    assert {p.item() for name, p in quick.named_parameters() if name.endswith("router_scale")} == {12.0}
    unit = torch.nn.functional.normalize(quick.visual.trunk.pos_embed[0], dim=-1)
    likeness = (unit @ unit.T)[27].view(8, 8)  # of the patch in row 3, column 3, with all others
    assert likeness.argmax() == 27
    assert likeness[3, 4] > likeness[3, 6]
    assert likeness[4, 3] > likeness[6, 3]
    assert (
        quick.visual.trunk.blocks[0].attn.proj.weight.std() < 0.3 * demo.visual.trunk.blocks[0].attn.proj.weight.std()
    )


def test_a_quick_start_needs_a_timm_tower_with_one_position_for_each_patch():
    with pytest.raises(ValueError, match="quick needs a timm image tower"):
        create_model(ModelConfig("ViT-S-32-alt", start="quick"))


def test_new_models_squash_pictures_into_values_from_minus_one_to_one(demo):
    found = demo.visual.preprocess_cfg
    assert found["mean"] == found["std"] == [0.5, 0.5, 0.5]
    assert found["resize_mode"] == "squash"
    assert found["size"] == (64, 64)


def test_every_packaged_architecture_names_a_tower_of_the_right_size():
    files = sorted(softmoe_clip.plugin.MODEL_CONFIGS.glob("*.json"))
    family = {f"{kind}-{size}" for kind in ("SoftMoE", "PlainViT") for size in ("S-16", "S-14", "B-16", "L-16", "H-14")}
    assert family | {"SoftMoE-demo", "PlainViT-demo", "SoftMoE-H-14-e128"} <= {file.stem for file in files}
    for file in files:
        config = json.loads(file.read_text())
        text = config["text_cfg"]
        assert text["width"] == config["embed_dim"] == 64 * text["heads"], "text towers follow CLIP's conventions"
        if file.stem.endswith("LAION"):  # the reference's contrastive recipe
            assert (text["layers"], text["context_length"], text["vocab_size"]) == (12, 16, 32_000)
        elif "demo" not in file.stem:
            assert (text["layers"], text["context_length"], text["vocab_size"]) == (12, 77, 49408)
        with torch.device("meta"):
            tower = timm.create_model(config["vision_cfg"]["timm_model_name"], num_classes=0)
        assert tower.patch_embed.img_size[0] == config["vision_cfg"]["image_size"]
        assert tower.num_features == config["embed_dim"]


def test_text_macs_are_those_of_attention_mlp_and_projection(demo):
    n, d = 12, TEXT["width"]
    block = 4 * n * d * d + 2 * n * n * d + 8 * n * d * d
    assert text_complexity(demo.text, n).macs == TEXT["layers"] * block + d * WIDTH


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("SoftMoE-dmo", "did you mean 'SoftMoE-demo'"),
        ("nowhere/model.json", r"cannot read nowhere/model\.json: No such file"),
    ],
)
def test_an_unknown_architecture_is_one_sentence(arch, message):
    with pytest.raises(ValueError, match=message):
        create_model(ModelConfig(arch))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"embed_dim": 16', "no whole JSON"),
        ("[]", "must hold a JSON object"),
        ('{"embed_dim": 16}', "has no vision_cfg, text_cfg"),
        ('{"embed_dim": 8, "vision_cfg": {"timm_model_name": "vit_nothing"}, "text_cfg": {}}', "vit_nothing"),
        ('{"embed_dim": 8, "vision_cfg": {"widht": 3}, "text_cfg": {}}', "widht"),
        (
            '{"embed_dim": 8, "vision_cfg": {"timm_model_name": "plain_vit_demo_patch8_64", "timm_proj": "none", '
            '"image_size": 96}, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}',
            "image_size is 96, but its timm tower takes 64: name a tower for that size",
        ),
        (
            '{"embed_dim": 64, "vision_cfg": {"timm_model_name": "plain_vit_demo_patch8_64", "timm_proj": "none", '
            '"image_size": 64}, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}',
            r"embed_dim is 64, but without a projection \(vision_cfg.timm_proj\) its timm tower gives 128",
        ),
        (
            '{"embed_dim": 8, "vision_cfg": {"width": 16, "layers": 1, "head_width": 8, "output_tokens": true}, '
            '"text_cfg": {"width": 16, "heads": 2, "layers": 1}}',
            r"vision_cfg.output_tokens is for CoCa alone \(multimodal_cfg\): leave it out",
        ),
        ('{"embed_dim": 64, "vision_cfg": null, "text_cfg": {}}', "vision_cfg must be an object, got None"),
        (
            '{"embed_dim": 8, "vision_cfg": {"image_size": 32, "patch_size": 64}, "text_cfg": {}}',
            "vision_cfg.patch_size 64 is larger than its pictures, of 32 pixels",
        ),
        (
            '{"embed_dim": 8, "vision_cfg": {"image_size": [32, 0]}, "text_cfg": {}}',
            r"vision_cfg.image_size must be a whole number from 1, got 0",
        ),
        (
            '{"embed_dim": 8, "vision_cfg": {"head_width": 0}, "text_cfg": {}}',
            "vision_cfg.head_width must be a whole number from 1, got 0",
        ),
        (
            '{"embed_dim": 8, "vision_cfg": {}, "text_cfg": {"context_length": 0}}',
            "context_length must be a whole number",
        ),
        ('{"embed_dim": true, "vision_cfg": {}, "text_cfg": {}}', "embed_dim must be a whole number from 1, got True"),
        (
            '{"embed_dim": 8, "vision_cfg": {"mlp_ratio": Infinity}, "text_cfg": {}}',
            "mlp_ratio must be a number above 0",
        ),
        ('{"embed_dim": 8, "vision_cfg": {"timm_model_name": 3}, "text_cfg": {}}', "describes no model .*: .*int"),
        (
            '{"embed_dim": 8, "vision_cfg": {"width": 16, "layers": 1, "head_width": 8}, '
            '"text_cfg": {"width": 16, "heads": 2, "layers": 1, "pool_type": "foo"}}',
            "describes no model that can be built: .*pool",
        ),
    ],
)
def test_a_wrong_architecture_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "Wrong.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        create_model(ModelConfig(str(path)))


@pytest.mark.parametrize("softmoe", [None, {"image_moe": {"num_experts": 4.0, "layers": [0]}}])
def test_experts_are_read_as_they_are_checked(softmoe):
    model_cfg = {"embed_dim": 8, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1}}
    model_cfg["vision_cfg"]["head_width"] = 8
    model_cfg["text_cfg"] = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    written = {"model_cfg": model_cfg, "preprocess_cfg": NEW_MODEL_PREPROCESS, "softmoe": softmoe}
    check_written(written, "it")
    experts = getattr(build(written).visual.transformer.resblocks[0].mlp, "experts", None)
    assert (experts is None) == (softmoe is None)
    assert experts is None or experts.num_experts == 4
