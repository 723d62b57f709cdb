"""The reference's image tower written out in NumPy, from the facts about it, and our parameters under its names."""

import json
from functools import partial

import numpy as np
from timm.layers import LayerNorm

from softmoe_clip.config import MoEConfig
from softmoe_clip.models.vit import ReferenceViT


def tower_of(config, params):
    """Build our tower of a golden file's config, in float64, filled with its parameters (theirs: flax's names)."""
    encoder, moe = config["encoder"], config["encoder"]["moe"]
    experts = params[f"Encoder/encoderblock_{moe['layers'][0]}/Moe/Router/mu"].shape[1:] if moe["layers"] else None
    tower = ReferenceViT(
        img_size=16,
        patch_size=config["patch_size"][0],
        num_classes=config["num_classes"] or 0,
        global_pool={"gap": "avg", "map": "map"}[config["classifier"]],
        fc_norm=False,
        class_token=False,
        embed_dim=config["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_ratio=encoder["mlp_dim"] / config["hidden_size"],
        qk_norm=encoder.get("attention_qk_norm", False),
        pos_embed=encoder.get("position_emb", {}).get("name", "learn").replace("learned", "learn"),
        norm_layer=partial(LayerNorm, eps=1e-6),
        act_layer="gelu_tanh",
        moe=MoEConfig(layers=moe["layers"], num_experts=experts[0], slots_per_expert=experts[1]) if experts else None,
    ).double()
    ours = in_their_names(dict(tower.named_parameters()), encoder["num_heads"])
    assert ours.keys() == params.keys()
    for name, view in ours.items():
        assert view.shape == params[name].shape, name
        view.data.copy_(view.new_tensor(params[name]))
    return tower


def in_their_names(tensors, num_heads):
    """Show our tower's tensors (parameters, or gradients) under the reference's names and in its shapes, as views."""
    views = {}

    def put(name, tensor):
        views[name] = tensor

    def put_linear(name, ours, rows=slice(None), heads=None):
        weight, bias = tensors[f"{ours}.weight"][rows].T, tensors[f"{ours}.bias"][rows]
        if heads is not None:
            weight = weight.unflatten(heads, (num_heads, -1))
        put(f"{name}/kernel", weight)
        put(f"{name}/bias", bias.unflatten(0, (num_heads, -1)) if heads == 1 else bias)

    def put_norm(name, ours):
        put(f"{name}/scale", tensors[f"{ours}.weight"])
        if f"{ours}.bias" in tensors:
            put(f"{name}/bias", tensors[f"{ours}.bias"])

    def put_attention(name, ours, places):
        for part, (linear, rows) in zip(("query", "key", "value"), places, strict=True):
            put_linear(f"{name}/{part}", linear, rows, heads=1)
        put_linear(f"{name}/out", f"{ours}.proj", heads=0)
        if f"{ours}.q_norm.weight" in tensors:
            put_norm(f"{name}/query_ln", f"{ours}.q_norm")
            put_norm(f"{name}/key_ln", f"{ours}.k_norm")

    d = tensors["norm.weight"].shape[0]
    thirds = [slice(i * d, (i + 1) * d) for i in range(3)]
    put("embedding/kernel", tensors["patch_embed.proj.weight"].permute(2, 3, 1, 0))
    put("embedding/bias", tensors["patch_embed.proj.bias"])
    if "pos_embed" in tensors:
        put("Encoder/posembed_input/pos_embedding", tensors["pos_embed"])
    for i in sorted({int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}):
        theirs, ours = f"Encoder/encoderblock_{i}", f"blocks.{i}"
        put_norm(f"{theirs}/LayerNorm_0", f"{ours}.norm1")
        put_norm(f"{theirs}/LayerNorm_1", f"{ours}.norm2")
        put_attention(f"{theirs}/SelfAttention", f"{ours}.attn", [(f"{ours}.attn.qkv", rows) for rows in thirds])
        if f"{ours}.mlp.slot_embed" in tensors:
            put(f"{theirs}/Moe/Router/mu", tensors[f"{ours}.mlp.slot_embed"])
            put(f"{theirs}/Moe/Router/scale", tensors[f"{ours}.mlp.router_scale"])
            for j, side in enumerate(("in", "out")):
                put(f"{theirs}/Moe/Mlp/Dense_{j}/kernel", tensors[f"{ours}.mlp.experts.w_{side}"])
                put(f"{theirs}/Moe/Mlp/Dense_{j}/bias", tensors[f"{ours}.mlp.experts.b_{side}"])
        else:
            for j in (0, 1):
                put_linear(f"{theirs}/Mlp/Dense_{j}", f"{ours}.mlp.fc{j + 1}")
    put_norm("Encoder/encoder_norm", "norm")
    if "attn_pool.latent" in tensors:
        put("MapHead/probe", tensors["attn_pool.latent"])
        places = [("attn_pool.q", slice(None)), *(("attn_pool.kv", rows) for rows in thirds[:2])]
        put_attention("MapHead/MultiHeadDotProductAttention", "attn_pool", places)
        put_norm("MapHead/LayerNorm", "attn_pool.norm")
        for j in (0, 1):
            put_linear(f"MapHead/Mlp/Dense_{j}", f"attn_pool.mlp.fc{j + 1}")
    if "head.weight" in tensors:
        put_linear("head", "head")
    return views


def numpy_tower(config, params, image):
    """Run the reference's mathematics on one batch (b, y, x, 3), in float64: the logits and what is on the way."""
    p, encoder, found = {name: np.asarray(value, float) for name, value in params.items()}, config["encoder"], {}
    side, d = config["patch_size"][0], config["hidden_size"]
    b, y, x, _ = image.shape
    patches = image.astype(float).reshape(b, y // side, side, x // side, side, 3).transpose(0, 1, 3, 2, 4, 5)
    tokens = patches.reshape(b, -1, side * side * 3) @ p["embedding/kernel"].reshape(-1, d) + p["embedding/bias"]
    fixed = encoder.get("position_emb", {}).get("name") == "sincos2d"
    tokens = tokens + (sincos(y // side, d) if fixed else p["Encoder/posembed_input/pos_embedding"])
    for i in range(encoder["num_layers"]):
        at = f"Encoder/encoderblock_{i}"
        normed = layer_norm(tokens, p, f"{at}/LayerNorm_0")
        tokens = tokens + attention(normed, normed, p, f"{at}/SelfAttention")
        normed = layer_norm(tokens, p, f"{at}/LayerNorm_1")
        tokens = tokens + (soft_moe if i in encoder["moe"]["layers"] else mlp)(normed, p, at)
        found[f"act:encoderblock_{i}"] = tokens
    found["act:encoded"] = tokens = layer_norm(tokens, p, "Encoder/encoder_norm")
    if config["classifier"] == "map":
        probe = np.repeat(p["MapHead/probe"], b, axis=0)
        z = attention(probe, tokens, p, "MapHead/MultiHeadDotProductAttention")
        pooled = (z + mlp(layer_norm(z, p, "MapHead/LayerNorm"), p, "MapHead"))[:, 0]
    else:
        pooled = tokens.mean(1)
    found["act:pre_logits"] = pooled
    found["logits"] = pooled @ p["head/kernel"] + p["head/bias"]
    return found


def layer_norm(x, p, at):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p[f"{at}/scale"] + p.get(f"{at}/bias", 0)


def attention(queries, keys, p, at):
    def heads(x, name):
        return np.einsum("bnd,dhk->bhnk", x, p[f"{at}/{name}/kernel"]) + p[f"{at}/{name}/bias"][:, None]

    q, k, v = heads(queries, "query"), heads(keys, "key"), heads(keys, "value")
    if f"{at}/query_ln/scale" in p:
        q, k = layer_norm(q, p, f"{at}/query_ln"), layer_norm(k, p, f"{at}/key_ln")
    weights = softmax(np.einsum("bhnk,bhmk->bhnm", q, k) / np.sqrt(q.shape[-1]), -1)
    mixed = np.einsum("bhnm,bhmk->bnhk", weights, v)
    return np.einsum("bnhk,hkd->bnd", mixed, p[f"{at}/out/kernel"]) + p[f"{at}/out/bias"]


def mlp(x, p, at):
    hidden = gelu(x @ p[f"{at}/Mlp/Dense_0/kernel"] + p[f"{at}/Mlp/Dense_0/bias"])
    return hidden @ p[f"{at}/Mlp/Dense_1/kernel"] + p[f"{at}/Mlp/Dense_1/bias"]


def soft_moe(x, p, at):
    mu = p[f"{at}/Moe/Router/mu"]
    unit = [v / np.sqrt((v**2).sum(axis, keepdims=True) + 1e-6) for v, axis in ((x, -1), (mu, 0))]
    logits = np.einsum("bnd,des->bnes", *unit) * p[f"{at}/Moe/Router/scale"]
    slots = np.einsum("bnd,bnes->besd", x, softmax(logits, 1))
    kernels, biases = ([p[f"{at}/Moe/Mlp/Dense_{j}/{part}"] for j in (0, 1)] for part in ("kernel", "bias"))
    hidden = gelu(np.einsum("besd,edf->besf", slots, kernels[0]) + biases[0][:, None])
    out = np.einsum("besf,efd->besd", hidden, kernels[1]) + biases[1][:, None]
    combine = softmax(logits.reshape(*logits.shape[:2], -1), 2).reshape(logits.shape)
    return np.einsum("besd,bnes->bnd", out, combine)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x, axis):
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def sincos(side, width):
    y, x = np.mgrid[:side, :side]
    omega = 10_000 ** -(np.arange(width // 4) / (width // 4 - 1))
    return np.concatenate([f(np.outer(axis.flatten(), omega)) for axis in (x, y) for f in (np.sin, np.cos)], axis=1)


def read_case(path):
    """Read a golden file: its config, its parameters, everything else."""
    case = dict(np.load(path))
    params = {name.removeprefix("param:"): value for name, value in case.items() if name.startswith("param:")}
    return json.loads(str(case["meta"]))["config"], params, case
