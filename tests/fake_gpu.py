"""A GPU that is not there: torch's fake tensors on `cuda` have shapes, types and devices but no numbers.

They refuse operations between devices, and whatever would make the CPU wait for a number (`.item()`, `if tensor`). What
they cannot show: speed, rounding, memory, and several processes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Make the tensors that are made inside fake ones, and differentiate without torch's engine, which wants a GPU."""
    with FakeTensorMode(), patch("torch.autograd.grad", grad), patch("torch.Tensor.backward", backward):
        yield


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Do what `torch.autocast("cuda", dtype)` does, which turns itself off where there is no GPU."""
    if dtype is None:
        yield
        return
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def moved(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the fake GPU, in place; inside `fake_gpu`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(like(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = like(buffer)
    return module


def like(tensor: Tensor) -> Tensor:
    """Return a fake tensor of the same shape and type."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)


class Copy(NamedTuple):
    """A tensor that went from the host to the GPU, and whether the CPU waited for it: for all that was asked before."""

    shape: torch.Size
    waits: bool


@contextmanager
def host_copies() -> Iterator[list[Copy]]:
    """List what goes from the host to the GPU; inside `fake_gpu`."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" != result.device.type:
                found.append(Copy(result.shape, not (kwargs or {}).get("non_blocking", False)))
            return result

    with Watch():
        yield found


def backward(loss: Tensor) -> None:
    """Add its gradient to every leaf's own."""
    for leaf, gradient in of_leaves(loss):
        leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def grad(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of some leaves, each of which has one."""
    found = of_leaves(loss)
    return [next(gradient for leaf, gradient in found if leaf is wanted) for wanted in leaves]


@torch.no_grad()
def of_leaves(loss: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Walk the graph from a loss to its leaves, as torch's engine does."""
    waiting = Counter(child for node in nodes(loss.grad_fn) for child, _ in node.next_functions)
    received = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready, found = [loss.grad_fn], []
    while ready:
        node = ready.pop()
        gradients = inputs_of(node, received.pop(node, {}))
        if hasattr(node, "variable"):
            found += [(node.variable, gradient) for gradient in gradients if gradient is not None]
            continue
        for (child, place), gradient in results_of(node, gradients):
            if gradient is not None:
                places = received.setdefault(child, {})
                places[place] = places[place] + gradient if place in places else gradient
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    return found


def results_of(node, gradients: list[Tensor | None]) -> list[tuple[tuple, Tensor | None]]:
    """Run a node; return where its results go, and what they are."""
    ours = isinstance(node, BackwardCFunction)
    results = node.apply(*gradients) if ours else node(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    if ours:  # which also answers for arguments that are no tensors
        results = [result for result, needed in zip(results, node.needs_input_grad, strict=True) if needed]
        return list(zip((edge for edge in node.next_functions if edge[0] is not None), results, strict=True))
    return [(edge, result) for edge, result in zip(node.next_functions, results, strict=True) if edge[0] is not None]


def inputs_of(node, places: dict[int, Tensor]) -> list[Tensor | None]:
    """Return the gradients of what a node gave, summed up and cast as the engine does; zeros for a function of ours."""
    gradients = []
    for place, wanted in enumerate(node._input_metadata):
        gradient = places.get(place)
        if gradient is None and isinstance(node, BackwardCFunction):
            gradient = torch.zeros(tuple(wanted.shape), dtype=wanted.dtype, device=wanted.device)
        if gradient is not None:
            assert gradient.device == wanted.device, f"{node.name()}: a gradient on {gradient.device}"
            gradient = gradient.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)
        gradients.append(gradient)
    return gradients


def nodes(root) -> set:
    """Return the nodes of a graph."""
    found, left = set(), [root]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [child for child, _ in node.next_functions]
    return found
