"""Our text tower in open_clip models: built from a text_cfg, trained, kept in a model folder; who takes Soft MoE."""

import json

import open_clip
import pytest
import torch

from softmoe_clip.config import ModelConfig, MoEConfig, TrainConfig
from softmoe_clip.data_pipelines.strict import load_strict
from softmoe_clip.data_pipelines.tokenizers import load_tokenizer
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.models.text import build_text_tower
from softmoe_clip.moe import SoftMoE, install
from softmoe_clip.training.loop import train

END = 1
SIZES = {"context_length": 7, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}


@pytest.mark.parametrize(
    ("text_cfg", "message"),
    [
        (SIZES | {"pool_type": "last", "softmoe_text": {}}, "does not take pool_type"),
        (SIZES | {"softmoe_text": {"pols": "map"}}, "does not take pols"),
        ({"width": 16, "softmoe_text": {}}, "lacks context_length, vocab_size, heads, layers"),
        (SIZES | {"softmoe_text": {"pool": "mean"}}, "softmoe_text.pool must be last or map, got 'mean'"),
        (SIZES | {"softmoe_text": {"padding": "ignore"}}, "must be attend or mask, got 'ignore'"),
        (SIZES | {"heads": 3, "softmoe_text": {}}, "width 16 cannot have 3 heads"),
        (SIZES | {"heads": 0, "softmoe_text": {}}, "text_cfg.heads must be a whole number from 1, got 0"),
        (SIZES | {"layers": -3, "softmoe_text": {}}, "text_cfg.layers must be a whole number from 1, got -3"),
        (SIZES | {"width": "16", "softmoe_text": {}}, "text_cfg.width must be a whole number from 1, got '16'"),
        (SIZES | {"mlp_ratio": 0, "softmoe_text": {}}, "text_cfg.mlp_ratio must be above 0"),
        (SIZES | {"mlp_ratio": None, "softmoe_text": {}}, "text_cfg.mlp_ratio must be above 0"),
        (
            SIZES | {"eos_id": 20, "softmoe_text": {}},
            "text_cfg.eos_id must be an id of the 20 in the vocabulary, got 20",
        ),
        (SIZES | {"eos_id": "</s>", "softmoe_text": {}}, "text_cfg.eos_id must be an id of the 20"),
        (SIZES | {"softmoe_text": False}, "softmoe_text must be an object with pool and padding, got False"),
        (SIZES | {"softmoe_text": True}, "softmoe_text must be an object with pool and padding, got True"),
    ],
)
def test_a_wrong_description_is_one_sentence(text_cfg, message):
    with pytest.raises(ValueError, match=message):
        build_text_tower(text_cfg, 8)


VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}


def architecture(tmp_path, text_cfg, **more):
    path = tmp_path / "Small.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text_cfg, **more}))
    return str(path)


@pytest.mark.parametrize("pool", ["last", "map"])
def test_our_tower_with_experts_comes_back_from_a_folder_with_the_same_bits(tmp_path, tokenizer_file, pool):
    arch = architecture(tmp_path, SIZES | {"softmoe_text": {"pool": pool, "padding": "mask"}})
    config = ModelConfig(arch, text_moe=MoEConfig(layers=[0], num_experts=3))
    tokenizer = load_tokenizer(tokenizer_file, 9)
    sizes = tokenizer.vocab_size, 9
    model = create_model(config, *sizes, eos_id=END).eval()
    written = folder_config(config, *sizes, END)
    assert model.context_length == model.text.context_length == 9
    assert model.vocab_size == model.text.vocab_size == tokenizer.vocab_size
    assert written["softmoe"] == {"text_moe": folder_config(config)["softmoe"]["text_moe"]}
    assert isinstance(model.text.blocks[0].mlp, SoftMoE)
    save(LoadedModel(model, tokenizer, transform_of(model), written), tmp_path / "model")
    again = load(tmp_path / "model")
    token_ids = again.tokenizer(["red", "a blue"])
    assert torch.equal(model.encode_text(token_ids), again.model.encode_text(token_ids))
    assert again.config == written
    assert again.model.text.eos_id == END
    with pytest.raises(TypeError, match="softmoe_text"):  # rather than a model that is something else
        open_clip.create_model(f"local-dir:{tmp_path / 'model'}")


def test_both_towers_of_a_packaged_architecture_learn():
    config = ModelConfig("SoftMoE-demo-text", text_moe=MoEConfig(num_experts=3))
    model = create_model(config, 30, 8, eos_id=END)
    out = model(torch.randn(2, 3, 64, 64), torch.randint(30, (2, 8)))
    (out["image_features"] * out["text_features"]).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("text."))
    assert all(p.requires_grad for p in model.parameters())


def test_a_run_trains_experts_in_the_text_tower_and_knows_the_end_token(tiny_settings, tmp_path):
    from accelerate.state import AcceleratorState

    arch = architecture(tmp_path, SIZES | {"context_length": 12, "softmoe_text": {"padding": "mask"}})
    model = {"arch": arch, "text_moe": {"layers": [0], "num_experts": 3}}
    settings = {**tiny_settings, "model": model, "out": str(tmp_path / "run"), "steps": 2}
    run = train(load_strict(TrainConfig, settings, ()))
    loaded = load(run)
    assert loaded.model.text.eos_id == loaded.tokenizer.eos_id
    assert loaded.config["softmoe"]["text_moe"]["num_experts"] == 3
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert any(key.startswith("routing/text/block_0/") for key in first)
    one = loaded.model.encode_text(loaded.tokenizer(["a red circle"]))
    cut = loaded.model.encode_text(loaded.tokenizer(["a red circle"])[:, :9])
    torch.testing.assert_close(one, cut, rtol=1e-5, atol=1e-6)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_causal_tower_refuses_soft_moe_and_says_why(tmp_path):
    config = ModelConfig(architecture(tmp_path, SIZES), text_moe=MoEConfig(num_experts=2))
    with pytest.raises(ValueError, match=r"causal: every slot mixes all tokens .* later ones\. Take a bidirectional"):
        create_model(config)


def test_an_open_clip_tower_that_masks_padding_refuses_soft_moe():
    from open_clip.transformer import TextTransformer

    masks = TextTransformer(7, 20, 16, 2, 2, no_causal_mask=True, use_pad_mask=True, pool_type="last")
    with pytest.raises(ValueError, match="do not pass the mask on"):
        install(masks, MoEConfig(num_experts=2))


def test_a_bidirectional_open_clip_tower_takes_soft_moe(tmp_path):
    arch = architecture(tmp_path, SIZES | {"layers": 2, "no_causal_mask": True, "pool_type": "last"})
    model = create_model(ModelConfig(arch, text_moe=MoEConfig(layers=[0, 1], num_experts=2)))
    assert all(isinstance(block.mlp, SoftMoE) for block in model.text.transformer.resblocks)
    assert model.encode_text(torch.randint(20, (2, 7))).shape == (2, 16)


def test_the_laion_recipes_towers_have_the_references_sizes():
    with torch.device("meta"):
        built = create_model(ModelConfig("PlainViT-B-16-256-LAION"))
    count = sum(p.numel() for p in built.text.parameters())
    block = 4 * 768 * 768 + 4 * 768 + 2 * 768 * 3072 + 3072 + 768 + 4 * 768 + 2 * 64
    assert count == (32000 + 16) * 768 + 12 * block + 2 * 768 + 768 * 768 + 768
    assert (built.text.pool, built.text.padding) == ("last", "attend")


@pytest.mark.parametrize("router", ["tokens_choice", "experts_choice", "hash", "sinkhorn", "base"])
def test_sparse_routers_are_refused_since_they_know_no_padding(router):
    from softmoe_clip.config import MoEConfig
    from softmoe_clip.models.text import TextTower
    from softmoe_clip.moe import install

    tower = TextTower(8, 50, 16, 2, 2, 32, 16)
    with pytest.raises(ValueError, match="a text tower takes soft routers only"):
        install(tower, MoEConfig(router=router, num_experts=2))
