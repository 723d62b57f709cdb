"""Put Soft MoE layers into a tower in place of the MLPs of chosen blocks."""

from torch import nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.moe.soft import SoftMoE

# The two linear layers of a block's MLP: timm's names, open_clip's names.
MLP_LAYERS = (("fc1", "fc2"), ("c_fc", "c_proj"))


def install(tower: nn.Module, config: MoEConfig) -> None:
    """Replace the MLPs of the blocks that `config.layers` names, in place; the experts get the hidden size of that MLP.

    The tower is a timm VisionTransformer, open_clip's TimmModel around one, open_clip's native VisionTransformer, our
    TextTower, or a TextTransformer of open_clip's that is bidirectional and attends to its padding.
    Every token, a class token too, takes part in the routing. Raises ValueError before anything is changed.
    """
    blocks, label = tower_blocks(tower), tower_label(tower)
    chosen = {i: blocks[i].mlp for i in chosen_blocks(config, len(blocks))}
    linears = {i: two_linears(mlp, i) for i, mlp in chosen.items()}
    for i, (first, _) in linears.items():
        layer = SoftMoE(
            first.in_features, config.num_experts, config.slots_per_expert, first.out_features, config.normalize
        )
        layer.label = f"{label}/block_{i}"
        blocks[i].mlp = layer.to(first.weight).train(chosen[i].training)


def tower_blocks(tower: nn.Module) -> list[nn.Module]:
    """Find the blocks of a tower; raises ValueError for one that has no list of attention + MLP blocks."""
    trunk = getattr(tower, "trunk", tower)
    blocks = getattr(trunk, "blocks", None) or getattr(getattr(trunk, "transformer", None), "resblocks", None)
    if getattr(trunk, "attn_mask", None) is not None:
        raise ValueError(
            f"cannot put MoE layers into a {type(trunk).__name__} that is causal: every slot mixes all tokens of a "
            "caption, so that a token would learn of later ones. Take a bidirectional text tower."
        )
    if getattr(trunk, "use_pad_mask", False) or getattr(trunk, "cls_emb", None) is not None:
        raise ValueError(
            f"cannot put MoE layers into a {type(trunk).__name__} that masks padding: its blocks do not pass the mask "
            "on. Take our text tower (text_cfg.softmoe_text)."
        )
    if blocks is None or not all(hasattr(block, "mlp") for block in blocks):
        raise ValueError(
            f"cannot put MoE layers into a {type(trunk).__name__}: "
            "give a timm VisionTransformer or open_clip's own VisionTransformer."
        )
    return list(blocks)


def tower_label(tower: nn.Module) -> str:
    """Say what routing statistics call the tower."""
    return "text" if hasattr(tower, "token_embedding") else "image"


def chosen_blocks(config: MoEConfig, depth: int) -> list[int]:
    """Turn `config.layers` into sorted block numbers, counted from 0."""
    if config.layers == "last_half":
        return list(range(depth - depth // 2, depth))
    if not config.layers or any(not 0 <= i < depth for i in config.layers):
        raise ValueError(f"moe layers {list(config.layers)} do not fit this tower: its blocks are 0 to {depth - 1}.")
    return sorted(set(config.layers))


def two_linears(mlp: nn.Module, block: int) -> tuple[nn.Linear, nn.Linear]:
    """Return both linear layers of a plain MLP; anything more in it would be lost, so it raises ValueError."""
    if isinstance(mlp, SoftMoE):
        raise ValueError(f"block {block} holds a Soft MoE layer already: choose other layers or a dense tower.")
    for names in MLP_LAYERS:
        layers = [getattr(mlp, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in layers) and {
            name.split(".")[0] for name, _ in mlp.named_parameters()
        } == set(names):
            return layers[0], layers[1]
    raise ValueError(
        f"the {type(mlp).__name__} of block {block} is not a plain two-layer MLP: experts cannot replace it."
    )
