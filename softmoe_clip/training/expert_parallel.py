"""A run whose experts are spread over processes: their gradients, the norm of all, and checkpoints that are whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from softmoe_clip.moe.expert_parallel import ExpertGroup, check_number, spread_parameters
from softmoe_clip.moe.experts import Experts
from softmoe_clip.training.distributed import PATIENCE

SENT_AT_ONCE = 2**28  # bytes of one process's part of a tensor, on its way into a checkpoint


class Mesh(NamedTuple):
    """Processes in a grid of data by experts: a row shares one set of experts out, a column holds the same share."""

    row: ExpertGroup
    column: "dist.ProcessGroup"
    row_number: int

    @property
    def with_main(self) -> bool:
        """Whether this process shares experts with the main one, which needs them to evaluate and to save."""
        return self.row_number == 0


def make_mesh(expert_parallel: int, num_processes: int) -> Mesh | None:
    """Put the processes into rows of `expert_parallel` neighbours; None where each has all experts."""
    if num_processes % expert_parallel:
        raise ValueError(
            f"expert_parallel {expert_parallel} does not divide the {num_processes} processes: launch a multiple of it"
        )
    if expert_parallel == 1:
        return None
    everyone = range(num_processes)
    rows = [[*everyone[first : first + expert_parallel]] for first in everyone[::expert_parallel]]
    columns = [[*everyone[first::expert_parallel]] for first in range(expert_parallel)]
    # Without it, or in a device mesh, these groups would have NCCL's patience while the main process writes a model.
    row, column = (dist.new_subgroups_by_enumeration(ranks, timeout=PATIENCE)[0] for ranks in (rows, columns))
    return Mesh(ExpertGroup(row, dist.get_rank(row), expert_parallel), column, dist.get_rank() // expert_parallel)


def check_spread(model: nn.Module, expert_parallel: int) -> None:
    """Refuse a model that has nothing to spread."""
    if expert_parallel > 1 and not any(isinstance(module, Experts) for module in model.modules()):
        raise ValueError(f"expert_parallel is {expert_parallel}, but the model has no experts: leave it out")


def told_of_spread(model: nn.Module, mesh: Mesh | None) -> list[str]:
    """Say how many parameters each process holds, where experts are spread."""
    if mesh is None:
        return []
    spread = spread_parameters(model)
    held = {name: p.numel() for name, p in model.named_parameters()}
    everything = sum(number * (mesh.row.size if name in spread else 1) for name, number in held.items())
    own = sum(held.values())
    return [f"experts are spread over {mesh.row.size} processes: each holds {own:,} of {everything:,} parameters"]


def kept_out_of_ddp(model: nn.Module) -> nn.Module:
    """Tell DDP, which would make all processes alike, to leave the experts alone that differ from one to the next."""
    if spread := spread_parameters(model):
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*spread])
    return model


def average_expert_gradients(model: nn.Module, mesh: Mesh | None) -> None:
    """Turn the gradients of spread experts into those of the mean loss of all processes, as DDP does for the rest.

    The exchange's backward pass has already summed what the processes of this row want.
    """
    if mesh is None:
        return
    parameters = dict(model.named_parameters())
    for name in spread_parameters(model):
        if (gradient := parameters[name].grad) is not None:
            if dist.get_world_size(mesh.column) > 1:
                dist.all_reduce(gradient, group=mesh.column)
            gradient /= dist.get_world_size()


def whole_norms(
    names: Sequence[str], each: Float[Tensor, " parameters"], model: nn.Module, mesh: Mesh | None
) -> Float[Tensor, " parameters"]:
    """Return the norms of these parameters' gradients, of spread experts those of all experts together."""
    if mesh is None:
        return each
    spread = spread_parameters(model)
    is_spread = torch.tensor([name in spread for name in names], device=each.device)
    squares = torch.where(is_spread, each.square(), 0)
    dist.all_reduce(squares, group=mesh.row.processes)
    return torch.where(is_spread, squares.sqrt(), each)


def gather_experts(tensors: dict[str, Tensor], model: nn.Module, mesh: Mesh | None) -> dict[str, Tensor]:
    """Return tensors named `<parameter>` or `<parameter>|<entry>`, those of spread experts whole, in the main process.

    All processes must call this together; what the others get back is not whole. What the main process gets of spread
    experts lies in its host's memory.
    """
    if mesh is None or not mesh.with_main:
        return tensors
    spread = spread_parameters(model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    result = {}
    for key, tensor in tensors.items():
        name = key.partition("|")[0]
        result[key] = gathered(tensor, mesh.row) if name in spread and tensor.shape == shapes[name] else tensor
    return result


def gathered(share: Tensor, group: ExpertGroup) -> Tensor:
    """Put the shares of a row together in its first process, a few experts at a time; the others get no expert."""
    is_first = group.rank == 0
    everyone = torch.empty(group.size if is_first else 0, *share.shape, dtype=share.dtype)
    step = max(1, SENT_AT_ONCE // max(1, share[0].nbytes))
    for start in range(0, len(share), step):
        part = share[start : start + step].contiguous()
        parts = [torch.empty_like(part) for _ in range(group.size)] if is_first else None
        dist.gather(part, parts, group=group.processes, group_dst=0)
        for owner, received in enumerate(parts or ()):
            everyone[owner, start : start + step] = received
    return everyone.flatten(0, 1)


def load_shares(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read a checkpoint's tensors; of those of spread experts only this process's share comes into memory."""
    spread = spread_parameters(model)
    if not spread:
        return load_file(file)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with safe_open(file, "pt") as stored:
        tensors = {}
        for key in stored.keys():  # noqa: SIM118  not a dict
            name = key.partition("|")[0]
            experts, there = spread.get(name), stored.get_slice(key)
            shape = there.get_shape()
            if experts is not None and key == name:
                check_number(name, shape[0], experts)
            if experts is not None and shape == [experts.num_experts, *shapes[name][1:]]:
                # A slice is a view of the mapped file; without the copy that would stay open for it.
                tensors[key] = there[experts.own.start : experts.own.stop].clone()
            else:
                tensors[key] = stored.get_tensor(key)
        return tensors
