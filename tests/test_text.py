"""Our text tower: equal to the reference, blind to padding where it masks it, in and out of a model folder."""

import json
import subprocess
import sys

import numpy as np
import open_clip
import pytest
import torch
from golden_towers import below, golden_case, golden_text_tower, golden_vit
from timm.layers import LayerNorm
from torch import nn

from softmoe_clip.config import ModelConfig, MoEConfig, TrainConfig
from softmoe_clip.data_pipelines.strict import load_strict
from softmoe_clip.models import text
from softmoe_clip.models.create import create_model, folder_config
from softmoe_clip.models.store import LoadedModel, load, save, transform_of
from softmoe_clip.models.text import TextTower, build_text_tower, through_first_end
from softmoe_clip.moe import SoftMoE, collect_routing, install
from softmoe_clip.training.loop import train
from softmoe_clip.training.losses import siglip_loss

END, VOCABULARY, LENGTH = 1, 20, 7
# Rows of 1, 3, 7 and 7 real tokens; the last one has no end token. What follows an end token is of no meaning.
TOKEN_IDS = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [5, 9, 1, 4, 4, 1, 8], [2, 3, 4, 5, 6, 7, 1], [9, 8, 7, 6, 5, 4, 3]])
LENGTHS = [1, 3, 7, 7]


def tower(pool="last", padding="attend", moe=False, perturb=True):
    """A small tower in float64 in which every parameter matters."""
    torch.manual_seed(0)
    built = TextTower(LENGTH, VOCABULARY, 16, 2, 2, 24, 12, pool=pool, padding=padding, eos_id=END)
    if moe:
        install(built, MoEConfig(layers=[0, 1], num_experts=3, slots_per_expert=2))
    built = built.double().eval()
    if perturb:
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return built


# An oracle in NumPy, one caption at a time, from the formulas of the paper and the reference.


def layer_norm(x, p, name):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.weight"]
    return scaled + p.get(f"{name}.bias", 0)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(queries, keys, values, p, name, num_heads=2):
    heads = []
    for q, k, v in zip(*(np.split(x, num_heads, axis=-1) for x in (queries, keys, values)), strict=True):
        q, k = layer_norm(q, p, f"{name}.q_norm"), layer_norm(k, p, f"{name}.k_norm")
        heads.append(softmax(q @ k.T / np.sqrt(q.shape[-1]), 1) @ v)
    return np.concatenate(heads, -1) @ p[f"{name}.proj.weight"].T + p[f"{name}.proj.bias"]


def mlp(x, p, name):
    hidden = gelu(x @ p[f"{name}.fc1.weight"].T + p[f"{name}.fc1.bias"])
    return hidden @ p[f"{name}.fc2.weight"].T + p[f"{name}.fc2.bias"]


def soft_moe(x, p, name):
    slots = p[f"{name}.slot_embed"]
    unit = x / np.sqrt((x**2).sum(1, keepdims=True) + 1e-6)
    logits = np.einsum("nd,des->nes", unit, slots / np.sqrt((slots**2).sum(0) + 1e-6)) * p[f"{name}.router_scale"]
    dispatch = softmax(logits, 0)
    combine = softmax(logits.reshape(len(x), -1), 1).reshape(logits.shape)
    inputs = np.einsum("nes,nd->esd", dispatch, x)
    w_in, b_in, w_out, b_out = (p[f"{name}.experts.{key}"] for key in ("w_in", "b_in", "w_out", "b_out"))
    outputs = [gelu(inputs[e] @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e] for e in range(len(inputs))]
    return np.einsum("nes,esd->nd", combine, np.stack(outputs))


def by_hand(model, token_ids):
    """Embed one caption; a masked tower is one that never gets to see the padding."""
    p = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    x = p["token_embedding.weight"][token_ids] + p["positional_embedding"][: len(token_ids)]
    for i in range(len(model.blocks)):
        name = f"blocks.{i}"
        qkv = layer_norm(x, p, f"{name}.norm1") @ p[f"{name}.attn.qkv.weight"].T + p[f"{name}.attn.qkv.bias"]
        x = x + attention(*np.split(qkv, 3, axis=1), p, f"{name}.attn")
        second = soft_moe if f"{name}.mlp.slot_embed" in p else mlp
        x = x + second(layer_norm(x, p, f"{name}.norm2"), p, f"{name}.mlp")
    x = layer_norm(x, p, "norm")
    if model.pool == "map":
        query = p["attn_pool.latent"][0] @ p["attn_pool.q.weight"].T + p["attn_pool.q.bias"]
        keys, values = np.split(x @ p["attn_pool.kv.weight"].T + p["attn_pool.kv.bias"], 2, axis=1)
        x = attention(query, keys, values, p, "attn_pool")
        x = x + mlp(layer_norm(x, p, "attn_pool.norm"), p, "attn_pool.mlp")
    return x[-1] @ p["head.weight"].T + p["head.bias"]


def error(model):
    """The largest difference from the oracle."""
    rows = TOKEN_IDS.numpy()
    if model.padding == "mask":
        rows = [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]
    expected = np.stack([by_hand(model, row) for row in rows])
    return np.abs(model(TOKEN_IDS).detach().numpy() - expected).max()


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "soft"])
@pytest.mark.parametrize("padding", ["attend", "mask"])
@pytest.mark.parametrize("pool", ["last", "map"])
def test_the_tower_equals_a_loop_over_captions(pool, padding, moe):
    assert error(tower(pool, padding, moe)) < 1e-12


def test_two_towers_equal_the_reference():
    case, params = golden_case("twotower_soft_siglip")
    meta = json.loads(str(case["meta"]))
    visual = golden_vit(meta["image"], below("img/", params))
    textual = golden_text_tower(meta["text"], below("txt/", params))
    features = {
        "zimg": visual(torch.from_numpy(case["image"]).double().permute(0, 3, 1, 2)),
        "ztxt": textual(torch.from_numpy(case["text"]).long()),
    }
    # The reference's unit vectors; F.normalize differs from them by about 1e-9.
    unit = {key: z / (z.norm(dim=-1, keepdim=True) + 1e-8) for key, z in features.items()}
    s, b = params["s"].requires_grad_(), params["b"].requires_grad_()
    loss = siglip_loss(unit["zimg"], unit["ztxt"], s.exp(), b)
    loss.backward()
    logits = unit["zimg"] @ unit["ztxt"].T * s.exp() + b
    per_row = -nn.functional.logsigmoid(logits * (2 * torch.eye(4) - 1)).sum(1)
    image, words = dict(visual.named_parameters()), dict(textual.named_parameters())
    gradients = {
        "s": s.grad,
        "b": b.grad,
        "img/Encoder/encoderblock_1/Moe/Router/mu": image["blocks.1.mlp.slot_embed"].grad,
        "img/Encoder/encoderblock_1/Moe/Router/scale": image["blocks.1.mlp.router_scale"].grad,
        "img/Encoder/posembed_input/pos_embedding": image["pos_embed"].grad,
        "txt/Embed_0/embedding": words["token_embedding.weight"].grad,
        "txt/Encoder/posembed_input/pos_embedding": words["positional_embedding"].grad[None],
        "txt/head/kernel": words["head.weight"].grad.T,
        "txt/head/bias": words["head.bias"].grad,
    }
    assert {f"grad:{name}" for name in gradients} == {key for key in case if key.startswith("grad:")}
    found = {**unit, "logits": logits, "loss_per_row": per_row, "loss_mean": loss}
    found |= {f"grad:{name}": gradient for name, gradient in gradients.items()}
    for key, value in found.items():
        tolerance = 1e-6 if key.startswith("grad:") else 1e-10
        difference = np.abs(value.detach().numpy() - case[key]).max()
        assert difference <= tolerance * max(1, np.abs(case[key]).max()), key


def test_the_map_head_takes_the_references_parameters():
    # Einsums over the reference's own layouts: (width, heads, head_width) and back.
    case, params = golden_case("twotower_soft_siglip")
    config, params = json.loads(str(case["meta"]))["text"] | {"pool_type": "map"}, below("txt/", params)
    block, rng = below("Encoder/encoderblock_0/", params), np.random.default_rng(0)
    parts = {f"MultiHeadDotProductAttention/{key}": v for key, v in below("SelfAttention/", block).items()}
    parts |= {f"LayerNorm/{key}": block[f"LayerNorm_0/{key}"] for key in ("scale", "bias")}
    parts |= {f"Mlp/Dense_{j}/{key}": block[f"Mlp/Dense_{j}/{key}"] for j in (0, 1) for key in ("kernel", "bias")}
    parts["probe"] = torch.zeros(1, 1, 16)
    head = {key: rng.normal(size=value.shape) for key, value in parts.items()}
    model = golden_text_tower(config, params | {f"MapHead/{key}": torch.from_numpy(v) for key, v in head.items()})
    seen = {}
    model.norm.register_forward_hook(lambda module, inputs, out: seen.update(tokens=out.detach().numpy()))
    model.head.register_forward_pre_hook(lambda module, inputs: seen.update(pooled=inputs[0].detach().numpy()))
    model(torch.from_numpy(case["text"]).long())

    def norm(x, scale, bias=0):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias

    a = below("MultiHeadDotProductAttention/", head)
    q = norm(np.einsum("bld,dhk->blhk", head["probe"], a["query/kernel"]) + a["query/bias"], a["query_ln/scale"])
    k = norm(np.einsum("bld,dhk->blhk", seen["tokens"], a["key/kernel"]) + a["key/bias"], a["key_ln/scale"])
    v = np.einsum("bld,dhk->blhk", seen["tokens"], a["value/kernel"]) + a["value/bias"]
    weights = softmax(np.einsum("qhk,blhk->bhql", q[0], k) / np.sqrt(8), -1)
    z = np.einsum("bhql,blhk,hkd->bqd", weights, v, a["out/kernel"])[:, 0] + a["out/bias"]
    hidden = gelu(
        norm(z, head["LayerNorm/scale"], head["LayerNorm/bias"]) @ head["Mlp/Dense_0/kernel"] + head["Mlp/Dense_0/bias"]
    )
    expected = z + hidden @ head["Mlp/Dense_1/kernel"] + head["Mlp/Dense_1/bias"]
    np.testing.assert_allclose(seen["pooled"], expected, rtol=0, atol=1e-11)


def test_what_is_real_goes_through_the_first_end_token():
    assert through_first_end(TOKEN_IDS, END).sum(1).tolist() == LENGTHS
    assert through_first_end(TOKEN_IDS, END)[1].tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "soft"])
@pytest.mark.parametrize("pool", ["last", "map"])
def test_a_captions_embedding_does_not_change_with_the_amount_of_padding(pool, moe):
    model = tower(pool, "mask", moe)
    for padded in (3, 4, 6):
        cut = model(TOKEN_IDS[1:2, :padded])
        torch.testing.assert_close(cut, model(TOKEN_IDS[1:2]), rtol=0, atol=1e-13)
    other = TOKEN_IDS.clone()
    other[1, 3:] = 13
    assert torch.equal(model(TOKEN_IDS), model(other))
    attending = tower(pool, "attend", moe)
    assert not torch.allclose(attending(TOKEN_IDS)[1], attending(other)[1])


def test_no_gradient_reaches_the_padding():
    model = tower("last", "mask", moe=True)
    model(TOKEN_IDS[1:2]).square().sum().backward()
    assert (model.positional_embedding.grad.abs().sum(1) > 0).tolist() == [True] * 3 + [False] * 4


def without_mask_in_attention(model, patch):
    patch.setattr(text, "attention_bias", lambda mask, tokens: None)


def without_mask_in_soft_moe(model, patch):
    whole = SoftMoE.forward
    patch.setattr(SoftMoE, "forward", lambda layer, tokens, mask=None: whole(layer, tokens))


def without_mask_in_pooling(model, patch):
    whole = TextTower.pooled
    patch.setattr(TextTower, "pooled", lambda model, tokens, mask: whole(model, tokens, None))


def without_the_end_token(model, patch):
    patch.setattr(text, "through_first_end", lambda ids, end: (ids != end).cumprod(1).bool())


def through_the_last_end(model, patch):
    patch.setattr(text, "through_first_end", lambda ids, end: (ids == end).flip(1).cumsum(1).flip(1) > 0)


def other_gelu(model, patch):
    for block in model.blocks:
        patch.setattr(block.mlp, "act", nn.GELU())


def other_eps(model, patch):
    patch.setattr(model.blocks[1].norm1, "eps", 1e-5)


def without_qk_norm(model, patch):
    patch.setattr(model.blocks[0].attn, "k_norm", nn.Identity())


def first_instead_of_last(model, patch):
    patch.setattr(TextTower, "pooled", lambda model, tokens, mask: tokens[:, 0])


def pooled_before_the_final_norm(model, patch):
    model.norm = nn.Identity()


def without_qk_norm_in_map(model, patch):
    model.attn_pool.q_norm = nn.Identity()


def probe_added_to_what_it_finds(model, patch):
    model.attn_pool.proj.register_forward_hook(lambda module, inputs, out: out + model.attn_pool.latent)


def map_without_its_mlp(model, patch):
    model.attn_pool.mlp = None


MUTANTS = {
    without_mask_in_attention: ("last", True),
    without_mask_in_soft_moe: ("last", True),
    without_mask_in_pooling: ("map", True),
    without_the_end_token: ("last", True),
    through_the_last_end: ("last", True),
    other_gelu: ("last", False),
    other_eps: ("last", False),
    without_qk_norm: ("last", False),
    first_instead_of_last: ("last", False),
    pooled_before_the_final_norm: ("last", False),
    without_qk_norm_in_map: ("map", False),
    probe_added_to_what_it_finds: ("map", False),
    map_without_its_mlp: ("map", False),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mistakes_are_caught(mutant, monkeypatch):
    pool, moe = MUTANTS[mutant]
    model = tower(pool, "mask", moe)
    mutant(model, monkeypatch)
    rows = [row[:length] for row, length in zip(TOKEN_IDS.numpy(), LENGTHS, strict=True)]
    found = model(TOKEN_IDS).detach().numpy()
    monkeypatch.undo()
    assert np.abs(found - np.stack([by_hand(tower(pool, "mask", moe), row) for row in rows])).max() > 1e-7


def test_the_start_is_the_references():
    torch.manual_seed(0)
    built = TextTower(16, 500, 64, 2, 1, 256, 48, pool="map")
    deviations = {
        built.token_embedding.weight: 64**-0.5,
        built.positional_embedding: 0.02,
        built.head.weight: 64**-0.5,
        built.blocks[0].attn.qkv.weight: 64**-0.5,
        built.blocks[0].mlp.fc1.weight: (2 / 320) ** 0.5,
        built.blocks[0].mlp.fc1.bias: 1e-6,
        built.attn_pool.kv.weight: 64**-0.5,
        built.attn_pool.latent: (2 / 65) ** 0.5,
        built.attn_pool.mlp.fc2.bias: 1e-6,
    }
    for parameter, std in deviations.items():
        assert parameter.std().item() == pytest.approx(std, rel=4 / parameter.numel() ** 0.5)
    assert not any((built.head.bias.any(), built.attn_pool.q.bias.any(), built.blocks[0].attn.qkv.bias.any()))
    norms = [module for module in built.modules() if isinstance(module, LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    assert not any("q_norm.bias" in name or "k_norm.bias" in name for name in built.state_dict())


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enable in (False, True):
        model = tower("map", "mask", moe=True).train()
        model.set_grad_checkpointing(enable)
        model(TOKEN_IDS).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_the_mask_works_in_half_precision_and_under_autocast():
    model = tower("map", "mask", moe=True).float()
    expected = model(TOKEN_IDS)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(TOKEN_IDS).float(), expected, rtol=0.1, atol=0.3)
    found = model.bfloat16()(TOKEN_IDS)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.3)


EXPORTED = """
import torch
from softmoe_clip.config import MoEConfig
from softmoe_clip.models.text import TextTower
from softmoe_clip.moe import install
for pool in ("last", "map"):
    tower = TextTower(7, 20, 16, 2, 2, 24, 12, pool=pool, padding="mask", eos_id=1).eval()
    install(tower, MoEConfig(layers=[1], num_experts=3))
    token_ids = torch.tensor([[5, 9, 1, 4, 4, 1, 8], [2, 3, 4, 5, 6, 7, 1], [3, 1, 1, 1, 1, 1, 1]])
    exported = torch.export.export(tower, (token_ids,), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
    torch.testing.assert_close(exported.module()(token_ids[:2]), tower(token_ids[:2]))
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_ids), tower(token_ids))
"""


@pytest.mark.slow
def test_the_tower_is_exported_for_any_batch_and_compiled_in_one_graph():
    # In a process of its own: the shape checks that the tests switch on cannot be compiled.
    subprocess.run([sys.executable, "-c", EXPORTED], check=True)


def test_routing_is_reported_under_the_text_towers_name():
    with collect_routing() as collected:
        tower("last", "mask", moe=True)(TOKEN_IDS)
    assert list(collected.means()) == ["text/block_0", "text/block_1"]


def test_captions_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match="captions of 8 ids do not fit a context_length of 7"):
        tower()(torch.zeros(1, 8, dtype=torch.long))


def test_masking_needs_an_end_token():
    with pytest.raises(ValueError, match="give the text tower an eos_id"):
        TextTower(LENGTH, VOCABULARY, 16, 2, 1, 24, 12, padding="mask")


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
    ],
)
def test_a_wrong_description_is_one_sentence(text_cfg, message):
    with pytest.raises(ValueError, match=message):
        build_text_tower(text_cfg, 8)


# In an open_clip model.

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}


def architecture(tmp_path, text_cfg, **more):
    path = tmp_path / "Small.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text_cfg, **more}))
    return str(path)


class Letters:
    """Ids of letters, as far as a model folder needs a tokenizer."""

    def __call__(self, captions):
        return torch.tensor(
            [[*(2 + ord(c) % 18 for c in caption[:6])] + [END] * (7 - len(caption[:6])) for caption in captions]
        )


@pytest.mark.parametrize("pool", ["last", "map"])
def test_our_tower_with_experts_comes_back_from_a_folder_with_the_same_bits(tmp_path, pool):
    arch = architecture(tmp_path, SIZES | {"softmoe_text": {"pool": pool, "padding": "mask"}})
    config = ModelConfig(arch, text_moe=MoEConfig(layers=[0], num_experts=3))
    model = create_model(config, 25, 9, eos_id=END).eval()
    written = folder_config(config, 25, 9, END)
    assert model.context_length == model.text.context_length == 9
    assert model.vocab_size == model.text.vocab_size == 25
    assert written["softmoe"] == {"text_moe": folder_config(config)["softmoe"]["text_moe"]}
    assert isinstance(model.text.blocks[0].mlp, SoftMoE)
    save(LoadedModel(model, Letters(), transform_of(model), written), tmp_path / "model")
    again = load(tmp_path / "model")
    token_ids = Letters()(["red", "a blue"])
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
