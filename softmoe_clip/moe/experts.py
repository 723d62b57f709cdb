"""The experts of a layer: one two-layer MLP each, all run in two batched matrix products."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_clip.moe.products import bmm

# gelu_tanh is the reference's; the others are those of dense models that become experts.
ACTIVATIONS = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Experts(nn.Module):
    """One two-layer MLP per expert: `experts(slots (b, e, s, d))` gives (b, e, s, d).

    The weights are w_in (e, d, f), b_in (e, f), w_out (e, f, d) and b_out (e, d), with f = `hidden`. All experts start
    from the same weights, as in the reference (split_rngs=False). Raises ValueError for an unknown activation.
    """

    def __init__(self, num_experts: int, width: int, hidden: int, activation: str = "gelu_tanh"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"experts have no activation {activation!r}: take {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.num_experts = num_experts
        self.own = range(num_experts)  # of the layer's experts, those that are here: see expert_parallel
        self.w_in = nn.Parameter(same_xavier(num_experts, width, hidden))
        self.b_in = nn.Parameter(torch.randn(hidden).mul(1e-6).repeat(num_experts, 1))
        self.w_out = nn.Parameter(same_xavier(num_experts, hidden, width))
        self.b_out = nn.Parameter(torch.randn(width).mul(1e-6).repeat(num_experts, 1))

    def forward(self, slots: Float[Tensor, "b e s d"]) -> Float[Tensor, "b e s d"]:
        """Each slot meets only its own expert; nothing mixes across the batch."""
        b, e, s, d = slots.shape
        # baddbmm on (e, d, f) weights was the fastest of twelve forms on CPU; the test holds the einsum it must equal.
        rows = slots.transpose(0, 1).reshape(e, b * s, d)
        hidden = ACTIVATIONS[self.activation](bmm(rows, self.w_in, self.b_in[:, None]))
        return bmm(hidden, self.w_out, self.b_out[:, None]).view(e, b, s, d).transpose(0, 1)

    def extra_repr(self) -> str:
        e, d, f = self.w_in.shape
        return f"num_experts={e}, width={d}, hidden={f}, activation={self.activation}"


def same_xavier(num_experts: int, fan_in: int, fan_out: int) -> Float[Tensor, "e i o"]:
    """Draw one Xavier-uniform kernel (fans of a single expert) and copy it to every expert."""
    return nn.init.xavier_uniform_(torch.empty(fan_in, fan_out)).repeat(num_experts, 1, 1)
