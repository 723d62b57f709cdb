"""The paper's image towers on timm's VisionTransformer, under the timm names softmoe_vit_* and plain_vit_*.

Pooling is timm's `global_pool`: `avg` (mean over tokens) or `map` (attention with a learned probe). Positions are
timm's `pos_embed`: `learn` or `sincos2d` (fixed).
"""

from typing import NamedTuple

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from softmoe_clip.config import MoEConfig
from softmoe_clip.models.positions import sincos2d
from softmoe_clip.models.reference_start import NORM, drop_qk_bias, init_linears_like_reference, init_probe
from softmoe_clip.moe.install import install
from softmoe_clip.moe.soft import lecun_normal


class Size(NamedTuple):
    """Width, blocks, hidden size of an MLP or expert, attention heads."""

    width: int
    depth: int
    hidden: int
    num_heads: int


class Tower(NamedTuple):
    """A size, its patch, its picture sizes, and the slots of its Soft MoE form (in the last half of the blocks).

    `variant` ends the name of a second Soft MoE form of the same dense tower.
    """

    size: str
    patch: int
    image_sizes: tuple[int, ...]
    num_experts: int
    slots_per_expert: int = 1
    variant: str = ""


SIZES = {
    "demo": Size(128, 4, 512, 2),
    "tiny": Size(192, 12, 768, 3),
    "small": Size(384, 12, 1536, 6),
    "base": Size(768, 12, 3072, 12),
    "large": Size(1024, 24, 4096, 16),
    "huge": Size(1280, 32, 5120, 16),
}
# Experts: the reference's numbers for S/16, S/14, B/16, L/16, H/14 (e128: the paper's smaller H/14); 32 for /32 as in
# the paper's Table 9; our choice for tiny. Slots stay the same at a higher resolution. The demo's forward FLOPs are 1 %
# above those of its dense twin.
TOWERS = (
    Tower("demo", 8, (64,), num_experts=14, slots_per_expert=4),
    Tower("tiny", 16, (224, 256, 384), num_experts=128),
    Tower("small", 16, (224, 256, 384), num_experts=128),
    Tower("small", 14, (224, 256, 384), num_experts=256),
    Tower("small", 32, (224, 256, 384), num_experts=32),
    Tower("base", 16, (224, 256, 384), num_experts=128),
    Tower("base", 32, (224, 256, 384), num_experts=32),
    Tower("large", 16, (224, 256, 384), num_experts=128),
    Tower("large", 32, (224, 256, 384), num_experts=32),
    Tower("huge", 14, (224, 256, 384), num_experts=256),
    Tower("huge", 14, (224, 256, 384), num_experts=128, variant="_e128"),
)


class ReferenceViT(VisionTransformer):
    """timm's ViT as google-research/vmoe builds and initialises it: qk-norm, mean over tokens, no class token."""

    def __init__(self, moe: MoEConfig | None = None, pos_embed: str = "learn", qk_norm: bool = True, **timm_arguments):
        learnt = "none" if pos_embed == "sincos2d" else pos_embed
        super().__init__(weight_init="skip", pos_embed=learnt, qk_norm=qk_norm, **timm_arguments)
        self.fixed_positions = pos_embed == "sincos2d"
        if qk_norm:
            pools = [] if self.attn_pool is None else [self.attn_pool]
            drop_qk_bias([block.attn for block in self.blocks] + pools)
        self.init_like_reference()
        if moe is not None:
            install(self, moe)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add the fixed positions of the patches where the tower has them; learnt ones are timm's business."""
        if self.fixed_positions:
            grid = x.shape[1:3] if self.dynamic_img_size else self.patch_embed.grid_size
            # In the weights' precision, as learnt ones are: autocast has made half precision of the patches.
            dtype = self.patch_embed.proj.weight.dtype
            x = x + sincos2d(*grid, self.embed_dim, dtype, x.device).view(x.shape[1:])
        return super()._pos_embed(x)

    @torch.no_grad()
    def init_like_reference(self) -> None:
        """Draw patches lecun_normal, positions normal(0.02), matrices xavier_uniform, biases of MLPs normal(1e-6)."""
        patches = self.patch_embed.proj
        patches.weight.copy_(
            lecun_normal(patches.weight[0].numel(), patches.out_channels).T.reshape(patches.weight.shape)
        )
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=0.02)
        # The reference's class token starts at 0; it has no registers, which start as timm's (equal ones stay equal).
        if self.cls_token is not None:
            nn.init.zeros_(self.cls_token)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)
        if self.attn_pool is not None:
            init_probe(self.attn_pool)
        init_linears_like_reference(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name what timm's optimizers should not decay: positions, probe, slot embeddings, router scales, biases."""
        ours = ("slot_embed", "router_scale", "b_in", "b_out", "latent")
        return super().no_weight_decay() | {name for name, _ in self.named_parameters() if name.endswith(ours)}


def build(variant: str, tower: Tower, image_size: int, soft: bool, pretrained: bool, **overrides) -> nn.Module:
    """Build one registered tower, a ReferenceViT; `overrides` are timm's (num_classes, global_pool, img_size, ...)."""
    size = SIZES[tower.size]
    activation = overrides.get("act_layer", "gelu_tanh")
    moe = MoEConfig(num_experts=tower.num_experts, slots_per_expert=tower.slots_per_expert, activation=activation)
    arguments = {
        "img_size": image_size,
        "patch_size": tower.patch,
        "embed_dim": size.width,
        "depth": size.depth,
        "num_heads": size.num_heads,
        "mlp_ratio": size.hidden / size.width,
        "moe": moe if soft else None,
        "global_pool": "avg",
        "class_token": False,
        "fc_norm": False,  # timm would move the last norm behind the mean
        "qk_norm": True,
        "norm_layer": NORM,
        "act_layer": activation,
    }
    # As timm's own ViTs: positions of weights from a file are resized, and `features_only` gives what blocks give.
    indices = overrides.pop("out_indices", 3)
    return build_model_with_cfg(
        ReferenceViT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": indices, "feature_cls": "getter"},
        **(arguments | overrides),
    )


def register(variant: str, tower: Tower, image_size: int, soft: bool) -> None:
    """Make one tower known to `timm.create_model` under its name."""

    def entry(pretrained: bool = False, **overrides) -> nn.Module:
        return build(variant, tower, image_size, soft, pretrained, **overrides)

    entry.__name__ = entry.__qualname__ = variant
    globals()[variant] = register_model(entry)  # timm lists it in __all__ of this module


NAMES = {
    f"{kind}_vit_{tower.size}_patch{tower.patch}{tower.variant}_{image_size}": (tower, image_size, kind == "softmoe")
    for tower in TOWERS
    for image_size in tower.image_sizes
    for kind in ("softmoe", *(() if tower.variant else ("plain",)))
}
# timm looks for this name in the module of an entry when it registers it.
default_cfgs = generate_default_cfgs(
    {
        variant: {
            "num_classes": 0,
            "input_size": (3, image_size, image_size),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for variant, (_, image_size, _) in NAMES.items()
    }
)
for _variant, _tower in NAMES.items():
    register(_variant, *_tower)
