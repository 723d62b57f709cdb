"""Tell whether a model computes what another one does: names and shapes of weights do not show all of it."""

import json
from dataclasses import asdict, fields

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from softmoe_clip.models.alike import experts_of
from softmoe_clip.models.written import TOWERS, sides
from softmoe_clip.moe.sparse import SparseMoE
from softmoe_clip.moe_config import MoEConfig

# What changes a layer's function and no shape; capacities, noise and losses may change from run to run.
FIXED = ("router", "normalize", "activation")
SAME = 1e-5  # of an embedding's length: float error, where weights and function are the same
TUNED = ("capacity", "top_k", "bpr", "group_size")  # of a sparse router, which a run may set anew


def other_experts(ours: dict | None, theirs: dict | None) -> str:
    """Say which settings of experts make `ours` another function than `theirs`, and what to write instead."""
    for tower in TOWERS:
        mine, other = experts_of(ours, tower), experts_of(theirs, tower)
        if other is None and mine is not None:
            return f"it has no experts there, leave model.{tower} out"
        if other is not None and (mine is None or any(getattr(mine, name) != getattr(other, name) for name in FIXED)):
            return f"its experts are model.{tower}={in_yaml(other)}"
    return ""


def in_yaml(config: MoEConfig) -> str:
    """Write what is not the default as a config, or the command line, takes it."""
    standard = {setting.name: setting.default for setting in fields(config)}
    chosen = {name: value for name, value in asdict(config).items() if value != standard[name]}
    return "{" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in chosen.items()) + "}"


def tune_alike(theirs: nn.Module, ours: nn.Module) -> None:
    """Set in the sparse routers of `theirs` what a run may set anew as it is in those of `ours`."""
    layers = dict(theirs.named_modules())
    for name, layer in ours.named_modules():
        if isinstance(layer, SparseMoE):
            for setting in TUNED:
                if hasattr(layer, setting):
                    setattr(layers[name], setting, getattr(layer, setting))


@torch.inference_mode()
def changed_embeddings(ours: nn.Module, theirs: nn.Module, token_ids: Int64[Tensor, "b l"]) -> dict[str, float]:
    """Return by how much of their length embeddings of noise and of captions differ, for each tower that differs.

    Both hold the same weights. `theirs` is taken to the resolution and the routing of `ours`, for good; where it cannot
    be taken to the resolution, pictures are not compared.
    """
    was_training = ours.training
    pairs = {}
    try:
        ours.eval()
        tune_alike(theirs, ours)
        if resized(theirs.visual, ours.visual):
            images = torch.randn(2, 3, *sides(ours.visual.image_size), generator=torch.Generator().manual_seed(0))
            pairs["image"] = ours.encode_image(images), theirs.encode_image(images)
        pairs["text"] = ours.encode_text(token_ids), theirs.encode_text(token_ids)
    finally:
        ours.train(was_training)
    changes = {name: ((mine - other).norm() / other.norm()).item() for name, (mine, other) in pairs.items()}
    return {name: change for name, change in changes.items() if not change <= SAME}  # NaN is a change, too


def resized(theirs: nn.Module, ours: nn.Module) -> bool:
    """Take an image tower to the resolution of another one that has its weights, positions resized; True if done."""
    if sides(theirs.image_size) == sides(ours.image_size):
        return True
    trunk = getattr(theirs, "trunk", None)
    if trunk is None and hasattr(theirs, "positional_embedding"):
        theirs.positional_embedding = ours.positional_embedding
    elif hasattr(trunk, "set_input_size") and getattr(trunk, "pos_embed", None) is not None:
        trunk.set_input_size(sides(ours.image_size))
        trunk.pos_embed = ours.trunk.pos_embed
    else:
        return False
    return True
