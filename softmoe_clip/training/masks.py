"""Dropout, drop path, patch dropout and router noise of a built model, drawn for each (seed, position)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from softmoe_clip.moe.sparse import SparseMoE
from softmoe_clip.training.draws import LANE_STEPS, keep_mask, module_key, normal, uniform

HIDDEN_DRAWS = (
    "the model draws random numbers that (seed, position) does not determine, so that no run of it could be repeated: "
    "set its dropout (of attention, of layers, or as a function) to 0"
)


class PositionDropout(nn.Module):
    """nn.Dropout; the rate is rounded to 1 / 65536, and what stays is scaled by the rounded one."""

    def __init__(self, p: float, key: int):
        super().__init__()
        self.p, self.key = p, key

    def forward(self, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        drop_steps = round(self.p * LANE_STEPS)
        if not self.training or drop_steps == 0:
            return x
        if drop_steps == LANE_STEPS:
            return x * 0
        scale = LANE_STEPS / (LANE_STEPS - drop_steps)
        return torch.where(keep_mask(self.key, x.shape, drop_steps), x * scale, 0)  # keeps bools for backward

    def extra_repr(self) -> str:
        return f"p={self.p}"


class PositionDropPath(nn.Module):
    """timm's DropPath: a residual branch is left out for a whole sample."""

    def __init__(self, drop_prob: float, scale_by_keep: bool, key: int):
        super().__init__()
        self.drop_prob, self.scale_by_keep, self.key = drop_prob, scale_by_keep, key

    def forward(self, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        if not self.training:
            return x
        keep = uniform(self.key, x.shape[:1]) >= self.drop_prob
        scale = 1 / (1 - self.drop_prob) if self.scale_by_keep and self.drop_prob < 1 else 1.0
        return x * (keep * scale).to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


class PositionPatchDropout(nn.Module):
    """timm's and open_clip's PatchDropout (arXiv 2212.00794): so many tokens of each picture stay, in drawn order."""

    def __init__(self, prob: float, num_prefix_tokens: int, ordered: bool, with_indices: bool, key: int):
        super().__init__()
        self.prob, self.num_prefix_tokens, self.ordered = prob, num_prefix_tokens, ordered
        self.with_indices, self.key = with_indices, key

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"] | tuple:
        """Return the tokens, or with `with_indices` also which patches they are, None where all stay."""
        if not self.training:
            return (x, None) if self.with_indices else x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        kept = self.kept(patches)
        patches = patches.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
        x = torch.cat([prefix, patches], dim=1) if self.num_prefix_tokens else patches
        return (x, kept) if self.with_indices else x

    def kept(self, patches: Float[Tensor, "b n d"]) -> Int64[Tensor, "b m"]:
        """Draw the patches that stay."""
        num_kept = max(1, int(patches.shape[1] * (1 - self.prob)))
        kept = uniform(self.key, patches.shape[:2]).argsort(dim=1, stable=True)[:, :num_kept]
        return kept.sort(dim=1).values if self.ordered else kept

    def extra_repr(self) -> str:
        return f"prob={self.prob}"


@dataclass(frozen=True)
class NoiseByPosition:
    """Standard normal noise for the logits of routing groups, whose pictures lie one after the other."""

    key: int

    def __call__(self, logits: Float[Tensor, "g m e"]) -> Float[Tensor, "g m e"]:
        return normal(self.key, logits.shape).to(logits)


def draw_by_position(model: nn.Module) -> list[str]:
    """Put such modules in place of those that draw from torch's generator; return what had to be turned off, in words.

    Turned off is what transformers drops inside its attention, or by a function. Raises ValueError for dropout inside
    the attention of other towers, where they are trained: a fused kernel draws it.
    """
    off = turn_off_hidden_dropout(model)
    refuse_attention_dropout(model)
    for name, module in list(model.named_modules()):
        key = module_key(name)
        if isinstance(module, SparseMoE):
            module.draw_noise = NoiseByPosition(key)
        elif (drawn := by_position(module, key)) is not None:
            around, _, own = name.rpartition(".")
            setattr(model.get_submodule(around), own, drawn.train(module.training))
    return off


def by_position(module: nn.Module, key: int) -> nn.Module | None:
    """Return what takes a module's place, None for one that draws nothing."""
    import open_clip
    from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices

    if type(module) is nn.Dropout and module.p:
        return PositionDropout(module.p, key)
    if isinstance(module, DropPath) and module.drop_prob:
        return PositionDropPath(module.drop_prob, module.scale_by_keep, key)
    if isinstance(module, PatchDropout | PatchDropoutWithIndices) and module.prob:
        with_indices = isinstance(module, PatchDropoutWithIndices)
        return PositionPatchDropout(module.prob, module.num_prefix_tokens, module.ordered, with_indices, key)
    if isinstance(module, open_clip.transformer.PatchDropout) and module.prob:
        return PositionPatchDropout(module.prob, int(module.exclude_first_token), False, False, key)
    return None


def turn_off_hidden_dropout(model: nn.Module) -> list[str]:
    """Set to 0 what transformers' modules drop inside attention or by a function, where they are trained."""
    off: dict[float, list[str]] = {}
    for name, module in model.named_modules():
        if not type(module).__module__.startswith("transformers.") or not is_trained(module):
            continue
        innermost = not any(is_attention(inside) for inside in module.modules() if inside is not module)
        for attribute in ("dropout", "attention_dropout", "attn_dropout", "activation_dropout", "layerdrop"):
            found = getattr(module, attribute, 0.0)
            if isinstance(found, float) and found:
                setattr(module, attribute, 0.0)
                off.setdefault(found, []).append(f"{name}.{attribute}")
            elif isinstance(found, nn.Dropout) and found.p and is_attention(module) and innermost:
                off.setdefault(found.p, []).append(f"{name}.{attribute}")
                found.p = 0.0
    return [
        f"dropout of {rate} is turned off where (seed, position) could not determine it: "
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        for rate, names in off.items()
    ]


def refuse_attention_dropout(model: nn.Module) -> None:
    """Refuse dropout of attention weights in what is trained."""
    for name, module in model.named_modules():
        rate = module.dropout if isinstance(module, nn.MultiheadAttention) else 0.0
        if isinstance(attention_dropout := getattr(module, "attn_drop", None), nn.Dropout):
            rate = attention_dropout.p
        if rate and is_trained(module):
            raise ValueError(
                f"{name} drops attention weights at a rate of {rate}, which (seed, position) cannot determine: set it "
                "to 0, and use drop path or patch dropout (timm_drop_path and patch_dropout of vision_cfg) instead"
            )


def is_attention(module: nn.Module) -> bool:
    """Whether this is an attention layer by its class's name, the only thing that transformers' ones have in common."""
    return "Attention" in type(module).__name__


def is_trained(module: nn.Module) -> bool:
    """Whether training changes something in it; else it stays in eval mode."""
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def no_hidden_draws(device: torch.device) -> Iterator[None]:
    """Refuse what draws from torch's own generators all the same; nothing else would notice that runs differ."""
    states: list[Callable[[], Tensor]] = [torch.get_rng_state]
    if device.type == "cuda":
        states.append(lambda: torch.cuda.get_rng_state(device))
    before = [state() for state in states]
    yield
    if not all(torch.equal(then, state()) for then, state in zip(before, states, strict=True)):
        raise ValueError(HIDDEN_DRAWS)
