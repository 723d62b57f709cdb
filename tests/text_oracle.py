"""A text tower in NumPy, one caption at a time, from the formulas of the paper and the reference."""

import numpy as np


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
