"""Experts spread over processes, for layers too large for one: slots travel to their experts and back (2006.16668)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_clip.moe.experts import Experts


class ExpertGroup(NamedTuple):
    """The processes that share one set of experts out among them, and the place of this one."""

    processes: "dist.ProcessGroup"
    rank: int
    size: int

    def share(self, num_experts: int) -> range:
        """Return the numbers of the experts that this process holds."""
        if num_experts % self.size:
            raise ValueError(f"expert_parallel {self.size} cannot share {num_experts} experts out equally")
        num_own = num_experts // self.size
        return range(self.rank * num_own, (self.rank + 1) * num_own)

    def __deepcopy__(self, memo: dict) -> "ExpertGroup":
        """Stay the same in the copy of a model: a process group cannot be copied."""
        return self


_group: ExpertGroup | None = None


@contextmanager
def spread_over(group: ExpertGroup | None) -> Iterator[None]:
    """Give layers that are built inside only this process's share of their experts; None: all of them."""
    global _group
    before, _group = _group, group
    try:
        yield
    finally:
        _group = before


def num_held(num_experts: int) -> int:
    """Return how many experts of a layer that is built here and now come to lie in this process."""
    return num_experts if _group is None else len(_group.share(num_experts))


def new_experts(num_experts: int, width: int, hidden: int, activation: str = "gelu_tanh") -> Experts:
    """Make the experts of a layer, or inside `spread_over` this process's share of them."""
    if _group is None:
        return Experts(num_experts, width, hidden, activation)
    return SpreadExperts(num_experts, width, hidden, activation, _group)


class SpreadExperts(Experts):
    """This process's share of a layer's experts; called like the whole layer, by all processes of the group together.

    Every process gives equally many images. The names of the parameters, and how the experts start, are those of
    `Experts`, of which the full set is never made.
    """

    def __init__(self, num_experts: int, width: int, hidden: int, activation: str, group: ExpertGroup):
        own = group.share(num_experts)
        super().__init__(len(own), width, hidden, activation)
        self.group, self.own, self.num_experts = group, own, num_experts

    def forward(self, slots: Float[Tensor, "b e s d"]) -> Float[Tensor, "b e s d"]:
        """Send each slot to the process of its expert, run the own experts on the slots of all, send the results back.

        On the way the first axis counts processes: those that slots go to, then those that they came from.
        """
        to_owners = slots.unflatten(1, (self.group.size, -1)).transpose(0, 1)
        mine = _Exchange.apply(to_owners, self.group.processes).flatten(0, 1)
        results = super().forward(mine).unflatten(0, (self.group.size, -1))
        return _Exchange.apply(results, self.group.processes).transpose(0, 1).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, own={self.own.start}-{self.own.stop - 1} of {self.num_experts}"


class _Exchange(torch.autograd.Function):
    """Part i of each process goes to process i, and stands there in the order of processes; backward is the same."""

    @staticmethod
    def forward(ctx, parts: Tensor, processes: "dist.ProcessGroup") -> Tensor:
        ctx.processes = processes
        return all_to_all(parts, processes)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grad, ctx.processes), None


def all_to_all(parts: Float[Tensor, "w ..."], processes: "dist.ProcessGroup") -> Float[Tensor, "w ..."]:
    """Exchange equal parts between processes, without gradient."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=processes)
    return received


def spread_parameters(model: nn.Module) -> dict[str, SpreadExperts]:
    """Return the parameters of which this process holds a share, by name, with the experts they belong to."""
    return {
        f"{name}.{own}" if name else own: module
        for name, module in model.named_modules()
        if isinstance(module, SpreadExperts)
        for own, _ in module.named_parameters()
    }


class OtherExperts(ValueError):
    """Weights are of another number of experts than the model has."""


def own_share(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Cut whole tensors, by the names of their parameters, to what this process holds of them."""
    cut = dict(state)
    for name, experts in spread_parameters(model).items():
        if name in cut:
            check_number(name, len(cut[name]), experts)
            cut[name] = cut[name][experts.own.start : experts.own.stop]
    return cut


def check_number(name: str, num_there: int, experts: SpreadExperts) -> None:
    """Refuse other experts here: a smaller number could have the shape of a share."""
    if num_there != experts.num_experts:
        raise OtherExperts(f"{name} is of {num_there} experts there, of {experts.num_experts} here")
