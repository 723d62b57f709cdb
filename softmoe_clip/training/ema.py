"""An exponential moving average of the trained weights, in float32, kept beside the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from softmoe_clip.config import EmaConfig
from softmoe_clip.training.sharding import local


class Ema:
    """Averages of the trained parameters, by name; what is frozen, and buffers, are the model's own."""

    def __init__(self, model: nn.Module, config: EmaConfig):
        self.config = config
        self.averages = {
            name: parameter.detach().float().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    def decay_at(self, step: int) -> float:
        """Return the decay of the update after `step` steps; the warmup is that of TensorFlow's averages."""
        updates = step // self.config.every
        return min(self.config.decay, (1 + updates) / (10 + updates)) if self.config.warmup else self.config.decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages towards the weights after `step` steps, if it is time to."""
        if step % self.config.every:
            return
        share = 1 - self.decay_at(step)
        for name, parameter in model.named_parameters():
            if name in self.averages:
                self.averages[name].lerp_(parameter.detach().float(), share)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Let a model compute with the averages, and give it its own weights back, to the bit."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    def swap(self, model: nn.Module) -> None:
        """Exchange weights and averages."""
        for name, parameter in model.named_parameters():
            if name in self.averages and isinstance(parameter, DTensor):  # fully_shard knows a share by its memory
                own, average = local(parameter), local(self.averages[name])
                kept = own.clone()
                own.copy_(average)
                average.copy_(kept)
            elif name in self.averages:
                parameter.data, self.averages[name] = self.averages[name], parameter.data

    def fill(self, averages: dict[str, Tensor]) -> None:
        """Put saved averages in place of these; raises ValueError where they are of other parameters."""
        if other := averages.keys() ^ self.averages.keys():
            raise ValueError(f"the averaged weights are of other parameters than the trained ones: {min(other)}")
        for name, average in self.averages.items():
            average.copy_(averages[name])

    def begin(self, model: nn.Module) -> None:
        """Begin anew from the model's weights."""
        self.fill({name: parameter.detach() for name, parameter in model.named_parameters() if name in self.averages})
