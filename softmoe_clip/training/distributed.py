"""Several processes as one: how they start, how embeddings cross them with their gradients, how they agree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

HOW_TO_LAUNCH = (
    "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no "
    "-m softmoe_clip train ..."
)


# How long processes wait for one that evaluates, or writes a large checkpoint; NCCL's own patience is ten minutes.
PATIENCE = timedelta(hours=4)


def make_accelerator(precision: str):
    """Return Accelerate's state for this process; refuse a launch whose processes do not know of each other.

    Without `cpu=True` a launch of two CPU processes starts two runs, each believing it is alone (Accelerate 1.15).
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if (launched := int(os.environ.get("WORLD_SIZE", 1))) > 1 and lacking:
        raise ValueError(
            f"{launched} processes were launched (WORLD_SIZE) but cannot find each other without {', '.join(lacking)}. "
            f"Use: {HOW_TO_LAUNCH}"
        )
    check_gpus(launched, torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0)))
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision=fp16 needs a GPU: take bf16 or float32")
    mixed = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]
    # Accelerate keeps the precision of the first run in a Python process, and refuses another one.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed, kwargs_handlers=[patient])
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched but {accelerator.num_processes} found each other. "
            f"On CPU use: {HOW_TO_LAUNCH}"
        )
    return accelerator


def check_gpus(num_processes: int, num_gpus: int, local_rank: int) -> None:
    """Refuse a process that does not see the GPU of its own number on this machine, where it sees any."""
    if num_processes > 1 and 0 < num_gpus <= local_rank:
        raise ValueError(
            f"process {local_rank} of this machine (LOCAL_RANK, counted from 0) sees {num_gpus} GPU(s): start no more "
            "processes than there are GPUs, and let each of them see all of its machine's (SLURM: --gpus-per-node, not "
            "--gpus-per-task)"
        )


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """Compute as a single process would, as the main process does when it measures while the others wait."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Return the number of processes that compute together."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def local_offset(num_local: int) -> int:
    """Return the row at which this process's part begins in a gathered tensor."""
    return dist.get_rank() * num_local if world_size() > 1 else 0


def gather(local: Tensor) -> Tensor:
    """Return the rows of all processes, in rank order, without gradient; every process must hold equally many."""
    if world_size() == 1:
        return local.detach()
    everyone = local.new_empty(dist.get_world_size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(everyone, local.contiguous())
    return everyone


class _GatherWithGrad(torch.autograd.Function):
    """All-gather whose backward sums what every process wants of a row; `accelerator.gather` drops gradients."""

    @staticmethod
    def forward(ctx, local: Tensor) -> Tensor:
        return gather(local)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_with_grad(local: Tensor) -> Tensor:
    """Return the rows of all processes, in rank order, differentiable; every process must hold equally many."""
    return local if world_size() == 1 else _GatherWithGrad.apply(local)


def over_processes(value: Tensor, reduce: Literal["mean", "sum", "max"]) -> Tensor:
    """Return the mean, sum or largest of a tensor over all processes, without gradient; the same in all of them."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX if reduce == "max" else dist.ReduceOp.SUM)
        if reduce == "mean":
            value /= world_size()
    return value


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is up in at least one process, the same answer in all of them."""
    return bool(over_processes(torch.tensor(int(flag), device=device), "max"))


def check_same_everywhere(what: str, value: int, device: torch.device) -> None:
    """Refuse to go on where processes have found different things, as machines do that do not share a folder."""
    least, most = (int(sign * over_processes(torch.tensor(sign * value, device=device), "max")) for sign in (-1, 1))
    if least != most:
        raise ValueError(
            f"{what} is {least} for one process and {most} for another: "
            "out must be a folder that all machines share, or a URL"
        )


def rank() -> int:
    """Return the number of this process among those that compute together."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all processes, in rank order; for what is no tensor, and rare: they are pickled."""
    everyone = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(everyone, value)
    return everyone
