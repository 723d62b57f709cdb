"""What a tower costs: parameters, and multiply-accumulates counted from shapes alone (1 MAC = 2 FLOP)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


class Complexity(NamedTuple):
    """Parameters of a module, and multiply-accumulates of one forward pass of one example."""

    num_parameters: int
    macs: int

    @property
    def flops(self) -> int:
        """Floating point operations of one forward pass of one example."""
        return 2 * self.macs


def complexity(module: nn.Module, example: Tensor) -> Complexity:
    """Count one forward pass on the meta device: nothing is computed, so a tower of 50 billion parameters is fine.

    Counts matrix products, convolutions and attention; norms, activations and softmaxes are left out, as usual.
    """
    state = {name: tensor.to("meta") for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    counter, modes = FlopCounterMode(display=False), {part: part.training for part in module.modules()}
    module.eval()  # in training a sparse layer refuses one example where its routing groups hold several
    try:
        with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            torch.func.functional_call(module, state, (example.to("meta"),))
    finally:
        for part, training in modes.items():
            part.training = training
    return Complexity(num_parameters(module), counter.get_total_flops() // 2)


def image_complexity(tower: nn.Module, image_size: int) -> Complexity:
    """Count an image tower on one square RGB picture of `image_size` pixels a side."""
    return complexity(tower, torch.empty(1, 3, image_size, image_size, device="meta"))


def text_complexity(tower: nn.Module, context_length: int) -> Complexity:
    """Count a text tower on one caption of `context_length` token ids."""
    return complexity(tower, torch.zeros(1, context_length, dtype=torch.long, device="meta"))


def num_parameters(module: nn.Module) -> int:
    """Count the numbers in all parameters, each shared one once."""
    return sum(parameter.numel() for parameter in module.parameters())


def soft_moe_macs(num_tokens: int, width: int, hidden: int, num_slots: int) -> int:
    """Multiply-accumulates of one Soft MoE layer per image: logits, dispatch and combine, then the experts."""
    return 3 * num_tokens * num_slots * width + 2 * num_slots * width * hidden


def mlp_macs(num_tokens: int, width: int, hidden: int) -> int:
    """Multiply-accumulates of one dense MLP per image."""
    return 2 * num_tokens * width * hidden
