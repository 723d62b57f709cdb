"""Routers chosen by config: what each takes, what each refuses, in towers, folders, runs and reports."""

import json

import pytest
import torch

from softmoe_clip.config import ROUTER_SETTINGS, ModelConfig, MoEConfig
from softmoe_clip.models.complexity import image_complexity
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save
from softmoe_clip.moe import ExpertsChoiceMoE, TokensChoiceMoE, install
from softmoe_clip.report.router_maps import router_maps

SETTINGS = {
    "identity": {"num_experts": 6, "slots_per_expert": 3},
    "tokens_choice": {"num_experts": 4, "top_k": 2, "capacity_factor": 1.05, "bpr": True, "group_size": 2},
    "experts_choice": {"num_experts": 4, "capacity_factor": 0.5, "capacity_rounding": "round"},
    "dense": {},
}


def moe_config(router, **overrides):
    return MoEConfig(router=router, **{**SETTINGS.get(router, {"num_experts": 4}), **overrides})


@pytest.fixture
def loaded(architecture_file, tokenizer_file):
    """Make a tiny model with a router, as `train` would write it."""
    from softmoe_clip.data_pipelines.tokenizers import load_tokenizer
    from softmoe_clip.models.store import transform_of

    tokenizer = load_tokenizer(tokenizer_file, 12)

    def make(router):
        config = ModelConfig(str(architecture_file), moe_config(router, layers=[1]))
        model = create_model(config, tokenizer.vocab_size, 12).eval()
        for name, parameter in model.visual.named_parameters():
            if "experts" in name or name.endswith("gate"):
                torch.nn.init.normal_(parameter, std=0.3)
        return LoadedModel(model, tokenizer, transform_of(model), folder_config(config, tokenizer.vocab_size, 12))

    return make


@pytest.mark.parametrize("router", ROUTER_SETTINGS)
def test_a_model_folder_comes_back_with_its_router(router, loaded, tmp_path):
    model = loaded(router)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    pixels = torch.randn(3, 3, 32, 32)
    assert torch.equal(again.model.encode_image(pixels), model.model.encode_image(pixels))
    layers = [[str(block.mlp) for block in m.model.visual.transformer.resblocks] for m in (model, again)]
    assert layers[0] == layers[1]
    assert ("experts" in layers[0][1]) == (router != "dense")


def test_a_tower_gets_the_layer_its_config_describes(loaded):
    layer = loaded("tokens_choice").model.visual.transformer.resblocks[1].mlp
    assert isinstance(layer, TokensChoiceMoE)
    assert (layer.top_k, layer.bpr, layer.group_size, layer.noise_std) == (2, True, 2, 0.0)
    assert layer.capacity == (1.05, "ceil", 4)
    assert layer.aux_weights == {"importance": 0.005, "load": 0.005, "gshard": 0.0}
    assert layer.label == "image/block_1"
    layer = loaded("experts_choice").model.visual.transformer.resblocks[1].mlp
    assert isinstance(layer, ExpertsChoiceMoE)
    assert layer.capacity == (0.5, "round", 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router": "soft", "top_k": 2}, "the router soft has no use for top_k=2"),
        ({"router": "uniform", "normalize": False}, "the router uniform has no use for normalize=False"),
        ({"router": "experts_choice", "bpr": True}, "the router experts_choice has no use for bpr=True"),
        ({"router": "experts_choice", "gshard_loss": 0.01}, "no use for gshard_loss"),
        ({"router": "tokens_choice", "slots_per_expert": 2}, "no use for slots_per_expert=2"),
        ({"router": "dense", "capacity_factor": 2.0}, "the router dense has no use for capacity_factor=2.0"),
        ({"router": "sparse"}, "router must be one of soft, uniform"),
        ({"router": "tokens_choice", "top_k": 33}, "top_k must be between 1 and the 32 experts, got 33"),
        ({"router": "tokens_choice", "capacity_factor": 0.0}, "capacity_factor must be above 0"),
        ({"router": "tokens_choice", "group_size": 0}, "group_size 1 or more"),
        ({"router": "tokens_choice", "capacity_factor": float("inf")}, "above 0 and finite.*got inf, 4 and 1$"),
        ({"router": "tokens_choice", "capacity_factor": float("nan")}, "above 0 and finite.*got nan"),
        ({"router": "tokens_choice", "load_loss": -1.0}, "load_loss must be 0 or more and finite, got -1.0"),
        ({"router": "tokens_choice", "noise_std": float("nan")}, "noise_std must be 0 or more and finite, got nan"),
        ({"router": "tokens_choice", "load_loss": 0.1}, "load_loss=0.1 does nothing without noise"),
        ({"layers": 3}, "layers must be last_half or a list of blocks such as .*, got 3"),
        ({"layers": [2, 1, 2]}, r"layers names a block twice: \[2, 1, 2\]"),
        ({"layers": [True]}, "layers must be last_half or a list of blocks such as .*, got .True."),
    ],
)
def test_a_setting_that_does_not_fit_the_router_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)


def native_tower():
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=8, width=24, layers=2, heads=2, mlp_ratio=2.0, output_dim=16)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MoEConfig(router="identity", num_experts=8, slots_per_expert=2), "17 tokens and 16 slots"),
        (
            MoEConfig(router="experts_choice", num_experts=64, capacity_rounding="round"),
            "capacity_factor 1.0 gives 64 experts less than one token each of 17",
        ),
    ],
)
def test_too_few_slots_are_refused_before_anything_changes(config, message):
    tower = native_tower()
    before = str(tower)
    with pytest.raises(ValueError, match=message):
        install(tower, config)
    assert str(tower) == before
    import timm

    timm_tower = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)  # 16 patches, one class token
    with pytest.raises(ValueError, match=message):
        install(timm_tower, config)


@pytest.mark.parametrize(
    "settings",
    [
        {"slots_per_expert": 10**6, "num_experts": 1},
        {"router": "tokens_choice", "num_experts": 1, "capacity_factor": 1e5},
        {"router": "experts_choice", "num_experts": 1, "capacity_multiple_of": 10**6},
    ],
)
def test_slots_whose_contents_do_not_fit_into_memory_are_refused_before_anything_changes(settings, monkeypatch):
    # Their weights would fit (a million slots of width 24 at most), what goes through them would not.
    monkeypatch.setattr("softmoe_clip.moe.memory.machine_memory", lambda: 150 * 2**20)
    tower = native_tower()
    before = str(tower)
    with pytest.raises(ValueError, match=r"the 1,\d+,\d+ slots of 1 experts need .* GiB for one picture or caption"):
        install(tower, MoEConfig(**settings))
    assert str(tower) == before


def test_a_larger_group_may_have_the_capacity_that_one_image_lacks():
    tower = native_tower()
    install(tower, MoEConfig(router="experts_choice", num_experts=64, capacity_rounding="round", group_size=8))
    layer, shapes = tower.transformer.resblocks[1].mlp, []
    layer.experts.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:3])))
    assert tower(torch.randn(16, 3, 32, 32)).shape == (16, 16)
    tower.eval()
    assert tower(torch.randn(1, 3, 32, 32)).shape == (1, 16)
    assert shapes == [(2, 64, 4), (1, 64, 1)]  # an image alone gets its share of a group's slots
    tower.train()
    image_complexity(tower, 32)
    assert tower.training


@pytest.mark.parametrize("router", ["dense", "tokens_choice"])
def test_a_tower_that_holds_experts_already_is_refused(router):
    tower = native_tower()
    install(tower, moe_config("experts_choice"))
    with pytest.raises(ValueError, match="block 1 holds a sparse MoE layer already"):
        install(tower, moe_config(router))


def test_sparse_layers_have_no_router_maps_and_the_page_says_why(loaded, tmp_path):
    from PIL import Image

    from softmoe_clip.report.html import write_report
    from softmoe_clip.report.overlays import draw_router_maps

    model, pictures = loaded("tokens_choice"), [Image.new("RGB", (32, 32))]
    assert router_maps(model, pictures, model.transform) == []
    with pytest.raises(ValueError, match="a sparse layer has no slots that mix tokens"):
        draw_router_maps(model, pictures, tmp_path / "maps.png")
    page = write_report(None, model, out=tmp_path).read_text()
    assert "1 sparse MoE layer, whose experts take whole patches" in page


def test_layers_with_fixed_routing_have_maps_too(loaded, tmp_path):
    from PIL import Image

    from softmoe_clip.report.html import write_report

    model = loaded("identity")
    (maps,) = router_maps(model, [Image.new("RGB", (32, 32))], model.transform)
    assert maps.dispatch.shape == (1, 6, 3, 4, 4)
    assert (
        maps.dispatch[0, 0, 1].ravel().tolist() == [1.0] + [0.0] * 15
    )  # slot 1 takes the first patch, slot 0 the class
    assert "1 Soft MoE layer" in write_report(None, model, out=tmp_path).read_text()


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


TOKENS_CHOICE = ("model.image_moe.router=tokens_choice", "model.image_moe.noise_std=1.0")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("router", [r for r in ROUTER_SETTINGS if r not in ("soft", "identity")])
def test_every_router_trains(router, tiny_config):
    from softmoe_clip.training.loop import train

    lines = metrics(train(tiny_config(f"model.image_moe.router={router}", "steps=2")))
    assert all(0 < line["loss"] < 100 for line in lines)
    assert ("aux_loss" in lines[0]) == (router == "tokens_choice")
    logged = {name.rsplit("/")[-1] for name in lines[0] if name.startswith("routing/image/block_1/")}
    if router in ("tokens_choice", "experts_choice", "hash", "sinkhorn", "base"):
        assert {"dropped", "filled", "load_max", "load_min", "gate_entropy", "gate_max"} <= logged
    if router == "tokens_choice":
        assert {"importance_loss", "gshard_loss"} <= logged


def test_auxiliary_losses_reach_the_total_loss(tiny_config, tmp_path):
    from safetensors.torch import load_file

    from softmoe_clip.training.loop import train

    gates, losses = [], []
    for weight in (0.0, 100.0):
        out = tmp_path / f"weight_{weight}"
        change = [f"model.image_moe.{name}_loss={weight}" for name in ("importance", "load")]
        run = train(tiny_config(*TOKENS_CHOICE, *change, "steps=2", f"out={out}", "optim.warmup=0"))
        weights = load_file(run / "model/open_clip_model.safetensors")
        gates.append(next(tensor for name, tensor in weights.items() if name.endswith("gate")))
        losses.append(metrics(run))
    assert losses[0][0]["loss"] == losses[1][0]["loss"]
    assert losses[0][0]["aux_loss"] == 0
    logged = losses[1][0]
    parts = [logged[f"routing/image/block_1/{name}_loss"] for name in ("importance", "load")]
    assert logged["aux_loss"] == pytest.approx(100 * sum(parts), rel=1e-5)
    assert logged["gradient_norm"] != losses[0][0]["gradient_norm"]
    assert not torch.equal(*gates)


def test_a_run_with_noise_that_goes_on_ends_as_one_that_was_not_stopped(tiny_config, tmp_path):
    from softmoe_clip.training.loop import train

    constant = (*TOKENS_CHOICE, "optim.schedule=constant", "log_every=2")
    train(tiny_config(*constant, "steps=2"))
    run = train(tiny_config(*constant, "steps=4"))
    in_one = train(tiny_config(*constant, "steps=4", f"out={tmp_path}/in_one"))
    weights = "model/open_clip_model.safetensors"
    assert (run / weights).read_bytes() == (in_one / weights).read_bytes()


def test_a_batch_that_does_not_hold_whole_groups_is_refused_before_anything_is_written(tiny_config, tmp_path):
    from softmoe_clip.training.loop import train

    with pytest.raises(ValueError, match="gets 8 images, which do not divide into routing groups of 3"):
        train(tiny_config("model.image_moe.router=experts_choice", "model.image_moe.group_size=3"))
    with pytest.raises(ValueError, match="less than one token each of 17"):
        train(
            tiny_config(
                "model.image_moe.router=experts_choice",
                "model.image_moe.num_experts=64",
                "model.image_moe.capacity_rounding=round",
            )
        )
    assert not (tmp_path / "run").exists()
