"""Our text tower: bidirectional as google-research/vmoe's, padding attended to or masked; its MLPs may be Soft MoE."""

from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from timm.layers import Attention, AttentionPoolLatent, Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softmoe_clip.models.reference_start import NORM, QK_NORM, drop_qk_bias, init_linears_like_reference, init_probe
from softmoe_clip.models.written import check_count
from softmoe_clip.moe.soft import lecun_normal

Pool = Literal["last", "map"]
Padding = Literal["attend", "mask"]

GELU = partial(nn.GELU, approximate="tanh")
# The sizes that text_cfg must hold for this tower, in open_clip's words; `mlp_ratio` and `eos_id` may be left out.
SIZES = ("context_length", "vocab_size", "width", "heads", "layers")


class Block(nn.Module):
    """Attention and MLP, each behind its norm: timm's block, but here the mask reaches a Soft MoE layer, too."""

    def __init__(self, width: int, num_heads: int, hidden: int):
        super().__init__()
        self.norm1 = NORM(width)
        self.attn = Attention(width, num_heads, qkv_bias=True, qk_norm=True, norm_layer=QK_NORM)
        self.norm2 = NORM(width)
        self.mlp = Mlp(width, hidden, act_layer=GELU)

    def forward(self, tokens: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None) -> Float[Tensor, "b l d"]:
        """Mix the tokens, then change each; a masked token is seen by no other."""
        tokens = tokens + self.attn(self.norm1(tokens), attn_mask=attention_bias(mask, tokens))
        masked = () if mask is None or isinstance(self.mlp, Mlp) else (mask,)
        return tokens + self.mlp(self.norm2(tokens), *masked)


class TextTower(nn.Module):
    """Token ids to one embedding for each caption.

    `pool` is the last token (big_vision's sticky end token), or MAP: attention by a learned probe, then an MLP.
    `padding` is attended to, as in the reference, where all rows have one length; or it is masked: tokens are real
    through the first `eos_id`, and the last of them is the one that `last` takes.
    """

    def __init__(
        self,
        context_length: int,
        vocab_size: int,
        width: int,
        num_heads: int,
        depth: int,
        hidden: int,
        output_dim: int,
        pool: Pool = "last",
        padding: Padding = "attend",
        eos_id: int | None = None,
    ):
        super().__init__()
        if padding == "mask" and eos_id is None:
            raise ValueError("padding: mask needs to know the end token: give the text tower an eos_id")
        self.context_length, self.vocab_size, self.output_dim = context_length, vocab_size, output_dim
        self.pool, self.padding, self.eos_id = pool, padding, eos_id
        self.grad_checkpointing = False
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden) for _ in range(depth))
        self.norm = NORM(width)
        self.attn_pool = map_head(width, num_heads, hidden) if pool == "map" else None
        self.head = nn.Linear(width, output_dim)
        self.init_like_reference()

    @torch.no_grad()
    def init_like_reference(self) -> None:
        """Draw ids normal(1 / sqrt(width)), positions normal(0.02), the head lecun_normal, the rest as image towers."""
        init_linears_like_reference(self)
        width, output_dim = self.head.in_features, self.head.out_features
        self.head.weight.copy_(lecun_normal(width, output_dim).T)
        nn.init.normal_(self.token_embedding.weight, std=width**-0.5)
        nn.init.normal_(self.positional_embedding, std=0.02)
        if self.attn_pool is not None:
            init_probe(self.attn_pool)

    def forward(self, token_ids: Int[Tensor, "b l"]) -> Float[Tensor, "b z"]:
        """Embed b captions; rows may be shorter than the context length, never longer."""
        if token_ids.shape[1] > self.context_length:
            raise ValueError(
                f"captions of {token_ids.shape[1]} ids do not fit a context_length of {self.context_length}"
            )
        mask = through_first_end(token_ids, self.eos_id) if self.padding == "mask" else None
        tokens = self.token_embedding(token_ids) + self.positional_embedding[: token_ids.shape[1]]
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, mask, use_reentrant=False)
            else:
                tokens = block(tokens, mask)
        return self.head(self.pooled(self.norm(tokens), mask))

    def pooled(self, tokens: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None) -> Float[Tensor, "b d"]:
        """Make one vector of the tokens of each caption."""
        if self.attn_pool is not None:
            return self.attn_pool(tokens, attn_mask=attention_bias(mask, tokens))
        if mask is None:
            return tokens[:, -1]
        return tokens[torch.arange(tokens.shape[0], device=tokens.device), mask.sum(1) - 1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for backward, and compute the rest again; open_clip calls this."""
        self.grad_checkpointing = enable

    def extra_repr(self) -> str:
        return f"pool={self.pool}, padding={self.padding}, eos_id={self.eos_id}"


def map_head(width: int, num_heads: int, hidden: int) -> AttentionPoolLatent:
    """Make the reference's MapHead: z = attention of a learned probe (qk-norm, nothing added), then z + MLP(LN(z))."""
    head = AttentionPoolLatent(width, num_heads=num_heads, norm_layer=NORM)
    drop_qk_bias([head])
    head.mlp = Mlp(width, hidden, act_layer=GELU)
    return head


def through_first_end(token_ids: Int[Tensor, "b l"], eos_id: int) -> Bool[Tensor, "b l"]:
    """Mark what is real: everything up to the first end token and that token; all of a row without one."""
    ends = token_ids == eos_id
    return ends.cumsum(1) - ends.long() == 0


def attention_bias(mask: Bool[Tensor, "b l"] | None, tokens: Float[Tensor, "b l d"]) -> Float[Tensor, "b 1 1 l"] | None:
    """Return what is added to attention logits: -inf for the masked; timm's unfused attention would add a bool as 1."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=tokens.dtype).masked_fill(~mask, -torch.inf)[:, None, None]


def build_text_tower(text_cfg: dict, output_dim: int) -> TextTower:
    """Build the tower of a text_cfg with the key `softmoe_text` (pool, padding); refuse a key that nothing reads."""
    sizes = dict(text_cfg)
    choices = sizes.pop("softmoe_text")
    choices = {} if choices is None else choices
    if not isinstance(choices, dict):
        raise ValueError(f"softmoe_text must be an object with pool and padding, got {choices!r}")
    missing = [name for name in SIZES if name not in sizes]
    unknown = sorted(set(sizes) - {*SIZES, "mlp_ratio", "eos_id"} | set(choices) - {"pool", "padding"})
    if missing or unknown:
        lacks = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"does not take {', '.join(unknown)}"] * bool(
            unknown
        )
        raise ValueError(f"text_cfg with softmoe_text (our text tower) {' and '.join(lacks)}")
    for name, kind in (("pool", Pool), ("padding", Padding)):
        if choices.get(name, get_args(kind)[0]) not in get_args(kind):
            raise ValueError(f"softmoe_text.{name} must be {' or '.join(get_args(kind))}, got {choices[name]!r}")
    check_sizes(sizes)
    if sizes["width"] % sizes["heads"]:
        raise ValueError(f"a text tower of width {sizes['width']} cannot have {sizes['heads']} heads of equal size")
    return TextTower(
        context_length=sizes["context_length"],
        vocab_size=sizes["vocab_size"],
        width=sizes["width"],
        num_heads=sizes["heads"],
        depth=sizes["layers"],
        hidden=int(sizes["width"] * sizes.get("mlp_ratio", 4.0)),
        output_dim=output_dim,
        eos_id=sizes.get("eos_id"),
        **choices,
    )


def check_sizes(sizes: dict) -> None:
    """Refuse sizes that no tower has, and an end token outside of the vocabulary, which would mark nothing."""
    for name in SIZES:
        check_count(sizes[name], f"text_cfg.{name}")
    ratio = sizes.get("mlp_ratio", 4.0)
    if not isinstance(ratio, int | float) or int(sizes["width"] * ratio) < 1:
        raise ValueError(f"text_cfg.mlp_ratio must be above 0, for a hidden layer of width * mlp_ratio, got {ratio!r}")
    end = sizes.get("eos_id")
    if end is not None and not (isinstance(end, int) and 0 <= end < sizes["vocab_size"]):
        raise ValueError(f"text_cfg.eos_id must be an id of the {sizes['vocab_size']:,} in the vocabulary, got {end!r}")
