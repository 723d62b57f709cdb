"""Put MoE layers into a tower in place of the MLPs of chosen blocks."""

from torch import nn

from softmoe_clip.moe.ablations import IdentityMoE, SoftUniformMoE, UniformMoE, UniformSoftMoE
from softmoe_clip.moe.assignment import BaseMoE, HashMoE, SinkhornMoE
from softmoe_clip.moe.expert_parallel import num_held
from softmoe_clip.moe.experts_choice import ExpertsChoiceMoE
from softmoe_clip.moe.memory import check_memory
from softmoe_clip.moe.shared import SharedExpert
from softmoe_clip.moe.soft import SoftMoE
from softmoe_clip.moe.sparse import SparseMoE
from softmoe_clip.moe.tokens_choice import TokensChoiceMoE
from softmoe_clip.moe_config import ROUTER_SETTINGS, MoEConfig

# The two linear layers of a block's MLP: timm's names, open_clip's names.
MLP_LAYERS = (("fc1", "fc2"), ("c_fc", "c_proj"))
LAYERS = {
    "soft": SoftMoE,
    "uniform": UniformMoE,
    "identity": IdentityMoE,
    "soft_uniform": SoftUniformMoE,
    "uniform_soft": UniformSoftMoE,
    "tokens_choice": TokensChoiceMoE,
    "experts_choice": ExpertsChoiceMoE,
    "hash": HashMoE,
    "sinkhorn": SinkhornMoE,
    "base": BaseMoE,
}
PER_PASS = " for one picture or caption, or one group of pictures"
# The layer's names of the losses, and the settings that weigh them.
AUX_LOSSES = {"importance": "importance_loss", "load": "load_loss", "gshard": "gshard_loss"}


def install(tower: nn.Module, config: MoEConfig) -> None:
    """Replace the MLPs of the blocks that `config.layers` names, in place; the experts get the hidden size of that MLP.

    The tower is a timm VisionTransformer, open_clip's TimmModel around one, open_clip's native VisionTransformer, our
    TextTower, or a TextTransformer of open_clip's that is bidirectional and attends to its padding. Every token, a
    class token too, takes part in the routing. The router `dense` leaves the MLPs where they are.
    Raises ValueError before anything is changed.
    """
    blocks, label = tower_blocks(tower), tower_label(tower)
    chosen = {i: blocks[i].mlp for i in chosen_blocks(config, len(blocks), label)}
    linears = {i: two_linears(mlp, i) for i, mlp in chosen.items()}
    if config.router == "dense":
        return
    check_fits([first for first, _ in linears.values()], config)
    layers = {i: new_layer(config, first.in_features, first.out_features) for i, (first, _) in linears.items()}
    if label == "text" and any(isinstance(layer, SparseMoE) for layer in layers.values()):
        raise ValueError(f"a text tower takes soft routers only, sparse ones know no padding; got {config.router}")
    check_tokens(next(iter(layers.values())), tower)
    for i, layer in layers.items():
        layer.label = f"{label}/block_{i}"
        layer = layer.to(linears[i][0].weight).train(chosen[i].training)
        blocks[i].mlp = SharedExpert(chosen[i], layer) if config.shared_expert else layer


def new_layer(config: MoEConfig, width: int, hidden: int) -> nn.Module:
    """Make the layer of a router, with fresh weights."""
    names = ROUTER_SETTINGS[config.router] - {"shared_expert", *AUX_LOSSES.values()}
    layer = LAYERS[config.router](width, hidden=hidden, **{name: getattr(config, name) for name in names})
    if config.router == "tokens_choice":
        layer.aux_weights = {loss: getattr(config, name) for loss, name in AUX_LOSSES.items()}
    return layer


def check_tokens(layer: nn.Module, tower: nn.Module) -> None:
    """Refuse a capacity below one, too few slots or too many, here: a run would meet them at its first step."""
    trunk = getattr(tower, "trunk", tower)
    if hasattr(trunk, "num_prefix_tokens"):
        num_tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
    elif hasattr(trunk, "grid_size"):
        num_tokens = trunk.grid_size[0] * trunk.grid_size[1] + 1
    elif hasattr(trunk, "context_length"):
        num_tokens = trunk.context_length
    else:
        return
    num_experts, (_, d, f) = layer.experts.num_experts, layer.experts.w_in.shape
    if isinstance(layer, SparseMoE):
        num_tokens *= layer.group_size
        num_slots = num_experts * layer.num_slots(num_tokens)
    else:
        num_slots = num_experts * layer.slots[1]
    if isinstance(layer, IdentityMoE):
        layer.check_tokens(num_tokens)
    # What every forward pass holds of one picture, or one routing group: weights, slots, and hidden numbers of each.
    check_memory(num_slots * (num_tokens + d + f), f"the {num_slots:,} slots of {num_experts:,} experts", PER_PASS)


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
    # NaFlex towers pad their pictures, which slots would mix in; TNT's have tokens within tokens, Hiera's fewer and
    # fewer of them.
    other = hasattr(trunk, "num_prefix_tokens") and not hasattr(trunk, "patch_embed")
    other = other or (hasattr(trunk, "patch_embed") and not hasattr(trunk, "global_pool"))
    if blocks is None and hasattr(trunk, "config"):  # transformers'
        raise ValueError(
            f"cannot put MoE layers into a text tower of transformers' ({type(trunk).__name__}): take our text tower "
            "(text_cfg.softmoe_text)."
        )
    if blocks is None or other or not all(hasattr(block, "mlp") for block in blocks):
        raise ValueError(
            f"cannot put MoE layers into a {type(trunk).__name__}: "
            "give a timm VisionTransformer or open_clip's own VisionTransformer."
        )
    return list(blocks)


def tower_label(tower: nn.Module) -> str:
    """Say what routing statistics call the tower."""
    return "text" if hasattr(tower, "token_embedding") else "image"


def chosen_blocks(config: MoEConfig, depth: int, label: str) -> list[int]:
    """Turn `config.layers` into sorted block numbers, counted from 0."""
    if config.layers == "last_half":
        if depth < 2:
            raise ValueError(f"the last half of {depth} block is none: give the {label} tower's block as layers [0].")
        return list(range(depth - depth // 2, depth))
    if not config.layers or any(not 0 <= i < depth for i in config.layers):
        raise ValueError(
            f"moe layers {list(config.layers)} do not fit this {label} tower: its blocks are 0 to {depth - 1}."
        )
    return sorted(config.layers)


def two_linears(mlp: nn.Module, block: int) -> tuple[nn.Linear, nn.Linear]:
    """Return both linear layers of a plain MLP; anything more in it would be lost, so it raises ValueError."""
    if isinstance(mlp, SoftMoE | SparseMoE | SharedExpert):
        kind = "sparse MoE" if isinstance(mlp, SparseMoE) else "Soft MoE"
        raise ValueError(f"block {block} holds a {kind} layer already: choose other layers or a dense tower.")
    for names in MLP_LAYERS:
        layers = [getattr(mlp, name, None) for name in names]
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            continue
        alone = {name.split(".")[0] for name, _ in mlp.named_parameters()} == set(names)
        # The first layer of a gated MLP gives gates, too: it is wider than what the second one takes.
        if alone and layers[0].out_features == layers[1].in_features:
            check_no_dropout(mlp, block)
            return layers[0], layers[1]
    raise ValueError(
        f"the {type(mlp).__name__} of block {block} is not a plain two-layer MLP: experts cannot replace it."
    )


def check_no_dropout(mlp: nn.Module, block: int) -> None:
    """Refuse dropout, which experts have not."""
    rates = [part.p for part in mlp.modules() if isinstance(part, nn.Dropout) and part.p > 0]
    if rates:
        raise ValueError(f"the MLP of block {block} drops out (p={rates[0]:g}), which experts do not: set it to 0.")


def check_fits(firsts: list[nn.Linear], config: MoEConfig) -> None:
    """Refuse experts and slots that do not fit into memory, given the first linear layer of each MLP they replace."""
    e, s = config.num_experts, config.slots_per_expert
    sizes = [(first.in_features, first.out_features) for first in firsts]
    num_parameters = sum(d * e * s + num_held(e) * (2 * d * f + d + f) for d, f in sizes)
    check_memory(num_parameters, f"{len(firsts)} MoE layers of {e:,} experts with {s:,} slots each")
