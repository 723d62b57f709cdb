"""Low-rank adapters: they alone learn, and a run writes a plain model that computes what the adapted one does."""

import builtins
import copy

import open_clip
import pytest
import torch

from softmoe_clip.config import CONTRASTIVE_DECAY, LoraConfig, MoEConfig, OptimConfig
from softmoe_clip.models.create import build
from softmoe_clip.training.freeze import in_words, train_mode, trained_names
from softmoe_clip.training.lora import add_adapters, merged_weights
from softmoe_clip.training.optim import adamw, decay_of

NATIVE = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
TIMM = {
    "image_size": 64,
    "timm_model_name": "softmoe_vit_demo_patch8_64",
    "timm_pool": "avg",
    "timm_proj": "linear",
}
OPEN_CLIP_TEXT = {"context_length": 6, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1}
OUR_TEXT = OPEN_CLIP_TEXT | {"softmoe_text": {"padding": "mask"}, "eos_id": 1}
QK_NORM_TEXT = OPEN_CLIP_TEXT | {"qk_norm": True}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

# Each: vision_cfg, image_moe, text_cfg, what gets adapters.
MODELS = {
    "attention of torch": (NATIVE, None, OPEN_CLIP_TEXT, [r"visual[.].*attn", r"visual[.].*mlp[.]c_(fc|proj)"]),
    "attention of timm": (TIMM, None, OPEN_CLIP_TEXT, [r"visual\..*attn\.(qkv|proj)", r"visual[.]head[.]proj"]),
    "experts of Soft MoE": (TIMM, None, OPEN_CLIP_TEXT, [r"visual[.].*[.]experts"]),
    "experts of one layer": (NATIVE, MoEConfig(num_experts=3), OPEN_CLIP_TEXT, [r"visual[.].*1[.].*[.]w_in"]),
    "sparse experts": (NATIVE, MoEConfig("tokens_choice", num_experts=3), OPEN_CLIP_TEXT, [r"visual[.].*[.]experts"]),
    "beside a shared expert": (NATIVE, MoEConfig(shared_expert=True, num_experts=2), OPEN_CLIP_TEXT, [r".*experts"]),
    "our text tower": (NATIVE, None, OUR_TEXT, [r"text[.].*attn[.]qkv", r"text[.].*mlp[.]fc[12]"]),
    "text with qk-norm": (NATIVE, None, QK_NORM_TEXT, [r"text[.].*[.]attn", r"text[.].*attn[.]out_proj"]),
}


def new_model(vision_cfg, image_moe, text_cfg):
    model_cfg = {"embed_dim": 16, "custom_text": True, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    moe = {} if image_moe is None else {"softmoe": {"image_moe": {**vars(image_moe), "layers": [1]}}}
    torch.manual_seed(3)
    return build({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS} | moe).eval()


def adapted(name, **settings):
    """A model and the same one with adapters that are not zero."""
    *parts, targets = MODELS[name]
    model = new_model(*parts)
    with_adapters = copy.deepcopy(model)
    add_adapters(with_adapters, LoraConfig(tuple(targets), **{"rank": 2, **settings}), (), seed=0)
    return model, with_adapters


def draw_b(model):
    """Give B numbers, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))


def outputs(model):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, *model.visual.image_size, generator=generator)
    token_ids = torch.randint(2, 40, (2, 6), generator=generator)
    out = model(images, token_ids)
    return torch.cat([out["image_features"], out["text_features"]])


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_compute_what_the_adapted_model_computes(name):
    model, with_adapters = adapted(name)
    with torch.inference_mode():
        start = outputs(model)
        torch.testing.assert_close(outputs(with_adapters), start, rtol=1e-5, atol=1e-6)
        draw_b(with_adapters)
        learnt = outputs(with_adapters)
        assert (learnt - start).abs().max() > 0.01
        model.load_state_dict(merged_weights(with_adapters))
        torch.testing.assert_close(outputs(model), learnt, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_reach_the_adapters_alone_and_are_those_of_the_function(name):
    _, model = adapted(name, also_train=("^logit_scale",))
    draw_b(model.double())
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad and n != "logit_scale"}
    assert all(".lora_" in n for n in adapters)
    weighted_sum(model).backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n not in adapters)
    assert all(p.grad.abs().max() > 0 for p in adapters.values())
    direction = {n: torch.randn_like(p) for n, p in adapters.items()}
    slope = sum((p.grad * direction[n]).sum().item() for n, p in adapters.items())
    sums = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for n, p in adapters.items():
                p.add_(step * direction[n])
        sums.append(weighted_sum(model).item())
    assert slope == pytest.approx((sums[0] - sums[1]) / 2e-5, rel=1e-4)


def weighted_sum(model):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, *model.visual.image_size, generator=generator, dtype=torch.float64)
    out = model(images, torch.randint(2, 40, (2, 6), generator=generator))
    weights = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    return (torch.cat([out["image_features"], out["text_features"]]) * weights).sum()


@pytest.mark.parametrize("name", ["attention of torch", "attention of timm", "experts of Soft MoE"])
def test_under_autocast_adapters_stay_in_float32_and_learn(name):
    _, model = adapted(name)
    draw_b(model)
    expected = outputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05)
    (found.float() * expected.detach().roll(1, dims=0)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if ".lora_" in n}
    assert all(gradient.dtype == torch.float32 and gradient.abs().max() > 0 for gradient in gradients.values())


def test_peft_itself_merges_to_the_same_weights():
    _, model = adapted("attention of timm")
    draw_b(model)
    merged = merged_weights(model)
    for name, layer in [*model.named_modules()]:
        if hasattr(layer, "lora_A"):
            layer.merge()
            assert torch.equal(layer.get_base_layer().weight, merged[f"{name}.weight"])


def test_a_tower_whose_names_end_those_of_the_other_one_is_adapted_alone():
    torch.manual_seed(0)
    model = open_clip.CLIP(16, NATIVE, OPEN_CLIP_TEXT)
    add_adapters(model, LoraConfig((r"transformer[.].*[.](attn|c_fc)",)), (), seed=0)
    assert {name.partition(".")[0] for name in adapter_names(model)} == {"transformer"}
    assert len(adapter_names(model)) == 4


def adapter_names(model):
    return [name for name in trained_names(model) if ".lora_" in name]


def test_the_first_adapters_depend_on_the_seed_alone():
    def first(seed, draws_before):
        model = new_model(*MODELS["experts of Soft MoE"][:3])
        torch.rand(draws_before)
        add_adapters(model, LoraConfig((r"visual[.].*[.](experts|qkv)",)), (), seed)
        return {name: p for name, p in model.named_parameters() if ".lora_A." in name}

    one, other, another_seed = first(1, 0), first(1, 5), first(2, 0)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(one[name], another_seed[name]) for name in one)


def test_adapters_scales_and_projections_are_trained_unless_they_are_frozen():
    model = new_model(*MODELS["attention of timm"][:3])
    config = LoraConfig((r"visual[.].*1[.]attn[.]qkv",), rank=2)
    add_adapters(model, config, ("^text",), seed=0)
    place = "visual.trunk.blocks.1.attn.qkv.lora_{}.default.weight"
    expected = ["logit_scale", place.format("A"), place.format("B"), "visual.head.proj.weight"]
    assert trained_names(model) == expected
    assert in_words(model).startswith("logit_scale 1 of 1, visual ")
    held = [p for group in adamw(model, OptimConfig()).param_groups for p in group["params"]]
    assert len(held) == 4
    train_mode(model)
    assert model.visual.trunk.blocks[1].attn.training
    assert not model.visual.trunk.blocks[0].training


def test_what_has_an_adapter_stays_as_it_is_whatever_also_train_says():
    model = new_model(*MODELS["our text tower"][:3])
    add_adapters(model, LoraConfig((r"text[.]head",), also_train=("^text",)), (), seed=0)
    trained = trained_names(model)
    assert "text.blocks.0.attn.qkv.weight" in trained
    assert "text.head.base_layer.weight" not in trained
    assert "text.head.lora_B.default.weight" in trained


def test_adapters_decay_towards_the_weights_they_began_with():
    _, model = adapted("experts of Soft MoE")
    assert {decay_of(name, CONTRASTIVE_DECAY) for name in adapter_names(model)} == {0.1}


@pytest.mark.parametrize(
    ("settings", "freeze", "message"),
    [
        ({"targets": ("visual[.]blocks",)}, (), "'visual\\[.\\]blocks' is the whole name of no module; .* could"),
        ({"targets": ("visual[.]trunk[.]norm",)}, (), "finds visual.trunk.norm, which can have no adapter"),
        ({"targets": (r"visual[.].*[.]attn",)}, (), r"blocks.0.attn, which .* \(Attention\); .*attn.qkv could"),
        ({"targets": (r"text[.].*out_proj",)}, (), r"attn.out_proj, which can .* \(NonDynamically"),
        ({"targets": (r".*experts",), "dropout": 0.1}, (), "dropout is for linear layers, not for .*experts.w_in"),
        ({"targets": (r".*qkv",), "also_train": ("vizual",)}, (), "lora.also_train: 'vizual' is found in no"),
        ({"targets": (r".*qkv",)}, ("vizual",), "freeze: 'vizual' is found in no"),
    ],
)
def test_mistakes_are_one_sentence_and_change_nothing(settings, freeze, message):
    model = new_model(*MODELS["experts of Soft MoE"][:3])
    before = [*model.state_dict()], trained_names(model)
    with pytest.raises(ValueError, match=message) as error:
        add_adapters(model, LoraConfig(**settings), freeze, seed=0)
    assert "\n" not in str(error.value)
    assert before == ([*model.state_dict()], trained_names(model))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora.rank=0"], "rank counts from 1"),
        (["lora.alpha=0"], "alpha is above 0"),
        (["lora.alpha=.inf"], "alpha is above 0"),
        (["lora.dropout=1"], "below 1"),
        (["lora.targets=[]"], "lora.targets is empty"),
        (['lora.targets=["("]'], r"lora.targets: '\(' is no regular expression"),
        (['freeze=["*"]'], r"freeze: '\*' is no regular expression"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tiny_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_config('lora.targets=[".*qkv"]', *overrides)


def test_without_peft_one_sentence_says_what_to_install(monkeypatch):
    without_peft(monkeypatch)
    with pytest.raises(ValueError, match=r"pip install 'softmoe-clip\[lora\]'"):
        adapted("attention of timm")


def without_peft(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *arguments):
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", refuse)
