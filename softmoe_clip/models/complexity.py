"""What a tower costs, counted from shapes alone: parameters, multiply-accumulates (1 MAC = 2 FLOP), memory."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from softmoe_clip.models.written import sides


class Complexity(NamedTuple):
    """Parameters of a module; multiply-accumulates, and memory beside the weights, of one example going forward.

    `kept_bytes` is what backward needs, `largest_bytes` what the largest single operation reads and writes.
    """

    num_parameters: int
    macs: int
    kept_bytes: int
    largest_bytes: int

    @property
    def flops(self) -> int:
        """Floating point operations of one forward pass of one example."""
        return 2 * self.macs


class ActivationBytes(TorchDispatchMode):
    """Watch operations run: `largest` is the most that one of them read and wrote, weights left out.

    `keep` is a hook for saved tensors; what it has seen counts in `kept`, each storage once.
    """

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.weights = {storage_key(weight) for weight in weights}
        self.saved: dict[int, Tensor] = {}  # held, so that no key is used twice
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # transformers asks whether all tokens are real, and there is nothing to look at
        out = operation(*args, **(kwargs or {}))
        touched = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        self.largest = max(self.largest, self.size({storage_key(tensor): tensor for tensor in touched}))
        return out

    def keep(self, tensor: Tensor) -> Tensor:
        self.saved[storage_key(tensor)] = tensor
        return tensor

    @property
    def kept(self) -> int:
        return self.size(self.saved)

    def size(self, tensors: dict[int, Tensor]) -> int:
        """Add up the storages that are no weights."""
        return sum(t.untyped_storage().nbytes() for key, t in tensors.items() if key not in self.weights)


def storage_key(tensor: Tensor) -> int:
    """Tell storages apart, on the meta device too, where every address is 0."""
    return tensor.untyped_storage()._cdata


def complexity(module: nn.Module, example: Tensor) -> Complexity:
    """Count one forward pass on the meta device: nothing is computed, so a tower of 50 billion parameters is fine.

    Counts matrix products, convolutions and attention; norms, activations and softmaxes are left out, as usual. Memory
    is that of plain attention, which holds the weights of every pair of tokens: fused kernels need less.
    """
    state = {name: tensor.to("meta") for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    counter, memory = FlopCounterMode(display=False), ActivationBytes(list(state.values()))
    hooks = torch.autograd.graph.saved_tensors_hooks(memory.keep, lambda tensor: tensor)
    modes = {part: part.training for part in module.modules()}
    module.eval()  # in training a sparse layer refuses one example where its routing groups hold several
    try:
        with counter, memory, hooks, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            torch.func.functional_call(module, state, (example.to("meta"),))
    finally:
        for part, training in modes.items():
            part.training = training
    return Complexity(num_parameters(module), counter.get_total_flops() // 2, memory.kept, memory.largest)


def image_complexity(tower: nn.Module, image_size: int | Sequence[int]) -> Complexity:
    """Count an image tower on one RGB picture of `image_size` pixels: a side, or height and width."""
    return complexity(tower, torch.empty(1, 3, *sides(image_size), device="meta"))


def text_complexity(tower: nn.Module, context_length: int) -> Complexity:
    """Count a text tower on one caption of `context_length` token ids."""
    return complexity(tower, torch.zeros(1, context_length, dtype=torch.long, device="meta"))


def num_parameters(module: nn.Module) -> int:
    """Count the numbers in all parameters, each shared one once."""
    return sum(parameter.numel() for parameter in module.parameters())
