"""A dense MLP beside a layer of experts: every token passes both, and their outputs are added."""

from jaxtyping import Float
from torch import Tensor, nn


class SharedExpert(nn.Module):
    """The dense MLP and an MoE layer whose output starts at zero: at first the block computes what it did before."""

    def __init__(self, shared: nn.Module, routed: nn.Module):
        super().__init__()
        self.shared, self.routed = shared, routed
        nn.init.zeros_(routed.experts.w_out)
        nn.init.zeros_(routed.experts.b_out)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Add what the experts say to what the MLP says."""
        return self.shared(tokens) + self.routed(tokens)

    @property
    def c_fc(self):
        """Stand in for the first linear layer, as SoftMoE.c_fc does."""
        return self.routed.c_fc
