"""Our text tower with the parameters of the reference's golden files; reference_vit does it for image towers."""

from pathlib import Path

import numpy as np
import torch

from softmoe_clip.models.text import TextTower

GOLDEN = Path(__file__).parent / "golden"


def golden_case(name):
    """Read a file's arrays, and its parameters apart from them: {path: float64 tensor}."""
    case = dict(np.load(GOLDEN / f"{name}.npz"))
    return case, {key[6:]: torch.from_numpy(value).double() for key, value in case.items() if key[:6] == "param:"}


def below(prefix, params):
    """The parameters under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}


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
    state = encoder_state(params, encoder)
    state["token_embedding.weight"], state["positional_embedding"] = params["Embed_0/embedding"], params[positions][0]
    state["head.weight"], state["head.bias"] = params["head/kernel"].T, params["head/bias"]
    if config["pool_type"] == "map":
        state |= map_head_state(below("MapHead/", params))
    tower.double().load_state_dict(state)
    return tower


def encoder_state(params, encoder):
    """Blocks and final norm under timm's names."""
    state = {"norm.weight": params["Encoder/encoder_norm/scale"], "norm.bias": params["Encoder/encoder_norm/bias"]}
    for i in range(encoder["num_layers"]):
        theirs, ours = below(f"Encoder/encoderblock_{i}/", params), f"blocks.{i}."
        for j in (0, 1):
            state[f"{ours}norm{j + 1}.weight"] = theirs[f"LayerNorm_{j}/scale"]
            state[f"{ours}norm{j + 1}.bias"] = theirs[f"LayerNorm_{j}/bias"]
        state |= attention_state(f"{ours}attn.", below("SelfAttention/", theirs), {"qkv": ("query", "key", "value")})
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
