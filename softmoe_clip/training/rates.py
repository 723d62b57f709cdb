"""How fast each parameter learns beside the others: factors by name, and by the depth of its block in a tower."""

import re

from torch import nn

from softmoe_clip.config import OptimConfig
from softmoe_clip.training.freeze import found, trained_names

# What comes before the first block, in the words of timm, open_clip, transformers and our text tower.
BEFORE_BLOCKS = re.compile(r"embed|_emb\b|position|patch|(cls|reg|dist|mask)_token|(^|[.])(conv1|ln_pre|norm_pre)[.]")
AFTER_BLOCKS = re.compile(r"pool|head|proj(ection)?$")  # MAP's pooling may have positions, too


def rate_factors(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Return, for each trained parameter, what its learning rate is multiplied by.

    Raises ValueError for an expression that finds no parameter or is never reached, or a layer decay for a tower that
    has no row of blocks or is not trained.
    """
    found(model, [*config.lr_scale], "optim.lr_scale")
    refuse_unreached(model, config.lr_scale, "optim.lr_scale")
    factors = {name: factor_of(name, config.lr_scale) for name in trained_names(model)}
    for tower, decay in (("image", config.image_layer_decay), ("text", config.text_layer_decay)):
        if decay is not None:
            levels = levels_from_top(model, tower)
            if not levels.keys() & factors.keys():
                raise ValueError(f"optim.{tower}_layer_decay: nothing of the {tower} tower is trained; leave it out")
            factors |= {name: factors[name] * decay**level for name, level in levels.items() if name in factors}
    return factors


def refuse_unreached(model: nn.Module, rules: dict[str, float], setting: str) -> None:
    """Raise ValueError for a rule that never counts, since one before it, which says otherwise, finds all it finds."""
    names = [name for name, _ in model.named_parameters()]
    hits = {pattern: {name for name in names if re.search(pattern, name)} for pattern in rules}
    for place, pattern in enumerate(rules):
        for first in [*rules][:place]:
            if hits[pattern] and hits[pattern] <= hits[first] and rules[pattern] != rules[first]:
                raise ValueError(
                    f"{setting}: {pattern!r} is never reached, as the first rule that is found counts and {first!r} "
                    "stands before it: put it in front"
                )


def factor_of(name: str, rules: dict[str, float]) -> float:
    """Return the factor of the first rule whose expression is found in a parameter's name, 1 without one."""
    return next((factor for pattern, factor in rules.items() if re.search(pattern, name)), 1.0)


def levels_from_top(model: nn.Module, tower: str) -> dict[str, int]:
    """Return how deep each parameter of a tower lies: 0 after the blocks, 1 in the last one, most in embeddings."""
    names = tower_names(model, tower)
    blocks, depth = row_of_blocks(model, names, tower)
    levels = {}
    for name in names:
        if name.startswith(blocks):
            levels[name] = depth - int(name.removeprefix(blocks).partition(".")[0])
        else:
            levels[name] = depth + 1 if comes_before(name) else 0
    return levels


def tower_names(model: nn.Module, tower: str) -> list[str]:
    """List a tower's parameters; open_clip's `CLIP` holds the parts of its text tower itself, all others in `text`."""
    names = [name for name, _ in model.named_parameters()]
    if tower == "image":
        return [name for name in names if name.startswith("visual.")]
    if hasattr(model, "text"):
        return [name for name in names if name.startswith("text.")]
    return [name for name in names if not name.startswith(("visual.", "logit_"))]


def comes_before(name: str) -> bool:
    """Tell embeddings from norms, pooling and heads, by name."""
    return bool(BEFORE_BLOCKS.search(name)) and not AFTER_BLOCKS.search(name)


def row_of_blocks(model: nn.Module, names: list[str], tower: str) -> tuple[str, int]:
    """Return where a tower has its blocks (a prefix of names) and how many: the largest row of modules of one kind.

    Raises ValueError where it holds no more than half of the tower, embeddings aside.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name in set(names)}
    rows: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(child) for child in module}) == 1:
            inside = sum(size for parameter, size in sizes.items() if parameter.startswith(f"{name}."))
            rows[f"{name}."] = inside, len(module)
    blocks = max(rows, key=lambda prefix: rows[prefix][0], default="")
    others = sum(size for name, size in sizes.items() if not comes_before(name))
    if not rows or 2 * rows[blocks][0] <= others:
        raise ValueError(f"optim.{tower}_layer_decay: the {tower} tower has no row of blocks to decay along")
    return blocks, rows[blocks][1]


def rate_lines(model: nn.Module, optimizer) -> list[str]:
    """Write each trained parameter's weight decay and factor as a line of a table, tabs between."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    rows = {
        names[parameter]: f"{names[parameter]}\t{group['weight_decay']:g}\t{group['lr_scale']:.6g}"
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return ["parameter\tweight_decay\tlr_scale", *(rows[name] for name in trained_names(model))]
