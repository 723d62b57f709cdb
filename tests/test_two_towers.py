"""Both towers, their logits and the loss equal the reference's golden numbers."""

import json

import numpy as np
import torch
from golden_text import below, golden_case, golden_text_tower
from reference_vit import tower_of
from text_oracle import gelu, softmax
from torch import nn

from softmoe_clip.training.losses import siglip_loss


def test_two_towers_equal_the_reference():
    case, params = golden_case("twotower_soft_siglip")
    meta = json.loads(str(case["meta"]))
    visual = tower_of(meta["image"], {name: value.numpy() for name, value in below("img/", params).items()})
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
