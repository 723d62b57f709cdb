"""Build towers and fill them with the parameters of the reference's golden files."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.layers import LayerNorm

from softmoe_clip.config import MoEConfig
from softmoe_clip.models.text import TextTower
from softmoe_clip.models.vit import ReferenceViT
from softmoe_clip.moe import install

GOLDEN = Path(__file__).parent / "golden"


def golden_case(name):
    """Read a file's arrays, and its parameters apart from them: {path: float64 tensor}."""
    case = dict(np.load(GOLDEN / f"{name}.npz"))
    return case, {key[6:]: torch.from_numpy(value).double() for key, value in case.items() if key[:6] == "param:"}


def below(prefix, params):
    """The parameters under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}


def golden_vit(config, params):
    """The reference's VisionTransformerMoe of 16 x 16 pictures and mean pooling, in float64."""
    encoder = config["encoder"]
    tower = ReferenceViT(
        img_size=16,
        patch_size=4,
        num_classes=config["num_classes"] or 0,
        global_pool="avg",
        fc_norm=False,
        class_token=False,
        embed_dim=config["hidden_size"],
        depth=encoder["num_layers"],
        num_heads=encoder["num_heads"],
        mlp_ratio=encoder["mlp_dim"] / config["hidden_size"],
        qk_norm=True,
        norm_layer=partial(LayerNorm, eps=1e-6),
        act_layer="gelu_tanh",
        moe=moe_config(encoder, params),
    ).double()
    state = encoder_state(params, encoder)
    state["patch_embed.proj.weight"] = params["embedding/kernel"].permute(3, 2, 0, 1)
    state["patch_embed.proj.bias"] = params["embedding/bias"]
    positions = "Encoder/posembed_input/pos_embedding"
    state["pos_embed"] = params[positions] if positions in params else sincos(4, config["hidden_size"])
    if config["num_classes"]:
        state["head.weight"], state["head.bias"] = params["head/kernel"].T, params["head/bias"]
    tower.load_state_dict(state)
    return tower


def golden_text_tower(config, params):
    """The reference's TextTransformer, in float64."""
    encoder, width, positions = config["encoder"], config["hidden_size"], "Encoder/posembed_input/pos_embedding"
    tower = TextTower(
        context_length=params[positions].shape[1],
        vocab_size=config["vocab_size"],
        width=width,
        num_heads=encoder["num_heads"],
        depth=encoder["num_layers"],
        hidden=encoder["mlp_dim"],
        output_dim=config["num_classes"],
        pool=config["pool_type"],
    )
    if moe := moe_config(encoder, params):
        install(tower, moe)
    state = encoder_state(params, encoder)
    state["token_embedding.weight"], state["positional_embedding"] = params["Embed_0/embedding"], params[positions][0]
    state["head.weight"], state["head.bias"] = params["head/kernel"].T, params["head/bias"]
    if config["pool_type"] == "map":
        state |= map_head_state(below("MapHead/", params))
    tower.double().load_state_dict(state)
    return tower


def moe_config(encoder, params):
    """Read from the parameters how many experts there are."""
    if not encoder["moe"]["layers"]:
        return None
    layers = encoder["moe"]["layers"]
    experts, slots = params[f"Encoder/encoderblock_{layers[0]}/Moe/Router/mu"].shape[1:]
    return MoEConfig(layers=layers, num_experts=experts, slots_per_expert=slots)


def encoder_state(params, encoder):
    """Blocks and final norm under timm's names."""
    state = {"norm.weight": params["Encoder/encoder_norm/scale"], "norm.bias": params["Encoder/encoder_norm/bias"]}
    for i in range(encoder["num_layers"]):
        theirs, ours = below(f"Encoder/encoderblock_{i}/", params), f"blocks.{i}."
        for j in (0, 1):
            state[f"{ours}norm{j + 1}.weight"] = theirs[f"LayerNorm_{j}/scale"]
            state[f"{ours}norm{j + 1}.bias"] = theirs[f"LayerNorm_{j}/bias"]
        state |= attention_state(f"{ours}attn.", below("SelfAttention/", theirs), {"qkv": ("query", "key", "value")})
        if i in encoder["moe"]["layers"]:
            state[f"{ours}mlp.slot_embed"] = theirs["Moe/Router/mu"]
            state[f"{ours}mlp.router_scale"] = theirs["Moe/Router/scale"]
            for j, side in enumerate(("in", "out")):
                state[f"{ours}mlp.experts.w_{side}"] = theirs[f"Moe/Mlp/Dense_{j}/kernel"]
                state[f"{ours}mlp.experts.b_{side}"] = theirs[f"Moe/Mlp/Dense_{j}/bias"]
        else:
            state |= mlp_state(f"{ours}mlp.", below("Mlp/", theirs))
    return state


def map_head_state(params):
    """The MAP head under timm's names."""
    state = attention_state(
        "attn_pool.", below("MultiHeadDotProductAttention/", params), {"q": ("query",), "kv": ("key", "value")}
    )
    state |= {"attn_pool.latent": params["probe"], **mlp_state("attn_pool.mlp.", below("Mlp/", params))}
    return state | {"attn_pool.norm.weight": params["LayerNorm/scale"], "attn_pool.norm.bias": params["LayerNorm/bias"]}


def attention_state(prefix, params, joined):
    """One attention layer; `joined` says which of the reference's matrices stand one below the other in timm's."""
    state, width = {}, params["out/bias"].shape[0]
    for name, parts in joined.items():
        state[f"{prefix}{name}.weight"] = torch.cat([params[f"{x}/kernel"].reshape(width, width).T for x in parts])
        state[f"{prefix}{name}.bias"] = torch.cat([params[f"{x}/bias"].flatten() for x in parts])
    state[f"{prefix}q_norm.weight"] = params["query_ln/scale"]
    state[f"{prefix}k_norm.weight"] = params["key_ln/scale"]
    state[f"{prefix}proj.weight"] = params["out/kernel"].reshape(width, width).T
    state[f"{prefix}proj.bias"] = params["out/bias"]
    return state


def mlp_state(prefix, params):
    """One dense MLP."""
    return {f"{prefix}fc{j + 1}.weight": params[f"Dense_{j}/kernel"].T for j in (0, 1)} | {
        f"{prefix}fc{j + 1}.bias": params[f"Dense_{j}/bias"] for j in (0, 1)
    }


def sincos(side, width):
    """The reference's fixed positions: [sin x, cos x, sin y, cos y]."""
    y, x = np.mgrid[:side, :side]
    omega = 10_000 ** -(np.arange(width // 4) / (width // 4 - 1))
    table = [f(np.outer(axis.flatten(), omega)) for axis in (x, y) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(table, axis=1))[None]
