"""How fast parts of a tower learn: factors by name, and by depth as BEiT's."""

import json

import pytest
from safetensors.torch import load_file
from tiny_bert import write_bert
from torch import nn

from softmoe_clip.config import ModelConfig, OptimConfig
from softmoe_clip.models.create import create_model
from softmoe_clip.training.freeze import freeze
from softmoe_clip.training.loop import train
from softmoe_clip.training.optim import make_optimizer
from softmoe_clip.training.rates import comes_before, levels_from_top, rate_factors, rate_lines

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 3}
VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One small model of each kind of tower."""
    folder = tmp_path_factory.mktemp("models")
    write_bert(folder / "bert")
    described = {
        "native": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT},
        "custom text": {"embed_dim": 8, "custom_text": True, "vision_cfg": VISION, "text_cfg": TEXT},
        "transformers": {
            "embed_dim": 8,
            "vision_cfg": VISION,
            "text_cfg": {
                "hf_model_name": str(folder / "bert"),
                "hf_tokenizer_name": str(folder / "bert"),
                "hf_proj_type": "linear",
                "context_length": 8,
            },
        },
    }
    described["ours"] = described["custom text"] | {
        "text_cfg": TEXT | {"softmoe_text": {"pool": "map"}},
    }
    built = {"timm": create_model(ModelConfig("SoftMoE-demo"), 300, 12)}
    for name, architecture in described.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(architecture))
        built[name] = create_model(ModelConfig(str(file)), None if name == "transformers" else 50, 8)
    return built


def levels_by_hand(names, blocks, depth, first):
    """What stands in `first` is below all blocks; what is in no block and not there is above."""
    levels = {}
    for name in names:
        if name.startswith(blocks):
            levels[name] = depth - int(name.removeprefix(blocks).split(".")[0])
        else:
            levels[name] = depth + 1 if name.startswith(tuple(first)) else 0
    return levels


@pytest.mark.parametrize(
    ("kind", "tower", "blocks", "depth", "first"),
    [
        ("native", "image", "visual.transformer.resblocks.", 2, ["visual.conv1", "visual.class_", "visual.ln_pre"]),
        ("native", "text", "transformer.resblocks.", 3, ["token_embedding", "positional_embedding"]),
        ("custom text", "text", "text.transformer.resblocks.", 3, ["text.token_embedding", "text.positional"]),
        ("transformers", "text", "text.transformer.encoder.layer.", 2, ["text.transformer.embeddings."]),
        ("timm", "image", "visual.trunk.blocks.", None, ["visual.trunk.patch_embed", "visual.trunk.pos_embed"]),
        ("ours", "text", "text.blocks.", 3, ["text.token_embedding", "text.positional_embedding"]),
    ],
)
def test_levels_are_counted_from_the_last_block_down_to_the_embeddings(models, kind, tower, blocks, depth, first):
    model = models[kind]
    first = [*first, "visual.positional"]
    prefix = "visual." if tower == "image" else ("text." if hasattr(model, "text") else "")
    names = [n for n, _ in model.named_parameters() if n.startswith(prefix) and not n.startswith("logit_")]
    names = names if prefix else [n for n in names if not n.startswith("visual.")]
    depth = depth or len(model.get_submodule(blocks.removesuffix(".")))
    found = levels_from_top(model, tower)
    assert found == levels_by_hand(names, blocks, depth, first)
    assert {0, 1, depth, depth + 1} <= set(found.values())


@pytest.mark.parametrize(
    "name", ["visual.trunk.attn_pool.pos_embed", "visual.trunk.attn_pool.latent", "text.head.weight"]
)
def test_pooling_and_heads_are_above_the_blocks_even_where_they_have_positions(name):
    assert not comes_before(name)


def test_timms_own_layer_decay_agrees_up_to_where_it_begins_to_count(models):
    from timm.optim._param_groups import param_groups_layer_decay

    trunk = models["timm"].visual.trunk
    theirs = {}
    names = {parameter: name for name, parameter in trunk.named_parameters()}
    for group in param_groups_layer_decay(trunk, layer_decay=0.5):
        theirs |= {f"visual.trunk.{names[p]}": group["lr_scale"] for p in group["params"]}
    ours = rate_factors(models["timm"], OptimConfig(image_layer_decay=0.5))
    # timm counts the last norm to the last block, and has no level above it where a tower has no head.
    shared = [name for name in theirs if ".blocks." in name or "embed" in name]
    assert len({ours[name] / theirs[name] for name in shared}) == 1


def test_factors_multiply_and_the_first_expression_that_is_found_wins(models):
    config = OptimConfig(lr_scale={"bias$": 0.5, "^visual[.]": 0.1}, image_layer_decay=0.5)
    factors = rate_factors(models["native"], config)
    assert factors["visual.transformer.resblocks.1.mlp.c_fc.bias"] == 0.5 * 0.5
    assert factors["visual.transformer.resblocks.0.mlp.c_fc.weight"] == 0.1 * 0.25
    assert factors["visual.conv1.weight"] == 0.1 * 0.125
    assert factors["visual.proj"] == 0.1
    assert factors["transformer.resblocks.0.mlp.c_fc.bias"] == 0.5
    assert factors["logit_scale"] == 1


def test_the_optimizers_groups_hold_each_parameter_with_its_decay_and_factor(models):
    model, config = models["native"], OptimConfig(lr_scale={"^visual[.]": 0.1}, text_layer_decay=0.5)
    optimizer = make_optimizer(model, config)
    factors = rate_factors(model, config)
    table = {line.split("\t")[0]: line.split("\t")[1:] for line in rate_lines(model, optimizer)[1:]}
    assert table.keys() == factors.keys() == dict(model.named_parameters()).keys()
    for name, (decay, factor) in table.items():
        assert float(factor) == pytest.approx(factors[name], rel=1e-5), name
        assert decay == ("0.1" if name.endswith("weight") and "ln" not in name and "embedding" not in name else decay)
    assert len({(g["weight_decay"], g["lr_scale"]) for g in optimizer.param_groups}) == len(optimizer.param_groups)


def test_a_tower_that_is_frozen_or_has_no_row_of_blocks_is_refused(models):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.text = nn.Linear(3, 3), nn.Linear(3, 3)

    with pytest.raises(ValueError, match=r"optim\.image_layer_decay: the image tower has no row of blocks"):
        rate_factors(Model(), OptimConfig(image_layer_decay=0.5))
    model = create_model(ModelConfig("SoftMoE-demo"), 300, 12)
    freeze(model, ["^visual"])
    with pytest.raises(ValueError, match=r"optim\.image_layer_decay: nothing of the image tower is trained"):
        rate_factors(model, OptimConfig(image_layer_decay=0.5))


def test_a_run_moves_each_parameter_by_its_own_rate(tiny_config, tmp_path, monkeypatch):
    """Lion's steps are as long as the rate: lr in every coordinate of one step without decay."""

    from softmoe_clip.training.build import build

    monkeypatch.chdir(tmp_path)
    config = tiny_config(
        "steps=1",
        "optim.name=lion",
        "optim.lr=0.001",
        "optim.warmup=0",
        "optim.schedule=constant",
        "optim.weight_decay={}",
        "optim.lr_scale={'^text[.]': 0.25}",
        "optim.image_layer_decay=0.5",
    )
    start = {name: tensor.clone() for name, tensor in build(config).model.state_dict().items()}
    run = train(config)
    found = load_file(run / "model/open_clip_model.safetensors")
    expected = {
        "visual.transformer.resblocks.1.ln_1.weight": 0.5,
        "visual.transformer.resblocks.0.ln_1.weight": 0.25,
        "visual.conv1.weight": 0.125,
        "visual.ln_post.weight": 1.0,
        "text.transformer.resblocks.0.ln_1.weight": 0.25,
    }
    for name, factor in expected.items():
        moved = (found[name] - start[name]).abs().max().item()
        assert moved == pytest.approx(0.001 * factor, rel=1e-2), name
    table = dict(line.split("\t")[::2] for line in (run / "parameter_rates.tsv").read_text().splitlines())
    assert all(float(table[name]) == factor for name, factor in expected.items())


def test_a_run_clips_its_gradients_to_the_norm_that_is_set(tiny_config, tmp_path, monkeypatch):
    """After one step of plain momentum two runs differ by the rate times the difference of their norms."""
    monkeypatch.chdir(tmp_path)
    plain = ("steps=1", "optim.name=momentum", "optim.lr=1", "optim.warmup=0")
    runs = [train(tiny_config(*plain, f"out=norm_{norm}", f"optim.clip_norm={norm}")) for norm in (0.1, 0.2)]
    one, other = (load_file(run / "model/open_clip_model.safetensors") for run in runs)
    apart = sum((one[name] - other[name]).double().square().sum() for name in one).sqrt()
    assert apart.item() == pytest.approx(0.1, rel=1e-3)
