"""A run whose weights, gradients and optimizer state are shared out over its processes, by torch's fully_shard."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from softmoe_clip.config import TrainConfig
from softmoe_clip.moe.experts import Experts
from softmoe_clip.training.distributed import over_processes


class UnderAutocast(nn.Module):
    """Two towers in the run's precision, as Accelerate puts a model that it prepares, which a sharded one cannot be."""

    def __init__(self, towers: nn.Module, autocast: Callable[[], AbstractContextManager]):
        super().__init__()
        self.towers, self.autocast = towers, autocast

    def forward(self, images: Tensor | None, token_ids: Tensor | None) -> dict[str, Tensor | None]:
        """Give what the towers give."""
        with self.autocast():
            return self.towers(images, token_ids)


def shard(model: nn.Module, config: TrainConfig, num_processes: int, device: torch.device) -> None:
    """Leave each process only its share of every parameter, experts by expert; nothing, where one process has them all.

    A share is whole again just before its block computes. Parameters that stay in each process are those of no
    dimension, which fully_shard refuses, and those that a two-tower model holds outside of its towers.
    """
    if config.sharding == "none" or num_processes == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # A result that is a view must not be written into; no layer does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    scalars = {parameter for parameter in model.parameters() if parameter.dim() == 0}
    # Autocast makes half precision of all that experts take, so that they may as well travel in it.
    half = torch.bfloat16 if config.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (num_processes,))
    for unit in units(model):
        # A tower's own part too, which torch would keep: averaged weights must not be computed with longer than asked.
        fully_shard(
            unit,
            mesh=mesh,
            ignored_params=scalars,
            reshard_after_forward=True,
            **({"mp_policy": policy} if isinstance(unit, Experts) else {}),
        )


def units(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what is put together and taken apart again as one: experts, then blocks, then towers."""
    for tower in model.children():
        if any(parameter.dim() for parameter in tower.parameters()):
            blocks = [*blocks_of(tower)]
            yield from (module for module in tower.modules() if isinstance(module, Experts) and module not in blocks)
            yield from blocks
            if not isinstance(tower, nn.ModuleList):
                yield tower


def blocks_of(tower: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of a tower's outermost lists that have parameters."""
    for child in tower.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (member for member in child.children() if any(p.dim() for p in member.parameters()))
        else:
            yield from blocks_of(child)


def is_sharded(model: nn.Module) -> bool:
    """Tell whether this process holds only a share of the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Return the processes that a model is shared out over."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


def told_of_shards(model: nn.Module) -> list[str]:
    """Say how many parameters each process holds, where they are shared out."""
    if not is_sharded(model):
        return []
    own = sum(local(parameter).numel() for parameter in model.parameters())
    everything = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"parameters are shared out over {dist.get_world_size()} processes: this one holds {own:,} of {everything:,}"
    ]


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, in the same memory; all of one that is not shared out."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """Take of a tensor what this process holds of another one of that shape."""
    if not isinstance(like, DTensor) or whole.shape != like.shape or isinstance(whole, DTensor):
        return whole
    share = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # none sent
    own = share.to_local().clone()  # else a view, for which the whole would stay in memory
    return DTensor.from_local(own, like.device_mesh, like.placements, shape=whole.shape, stride=whole.stride())


def gather_shares(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Put tensors together, one at a time; only who keeps them has them afterwards, those shared out on the CPU.

    All processes must call this together.
    """
    result = {}
    for name, tensor in tensors.items():
        full = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            result[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return result


def average_scalar_gradients(model: nn.Module) -> None:
    """Average the gradients of what every process holds, once in a step; those of shares have been averaged already."""
    if is_sharded(model):
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                parameter.grad.copy_(over_processes(parameter.grad, "mean"))


def clip_gradients(model: nn.Module, max_norm: float, norm: Float[Tensor, ""]) -> None:
    """Scale the gradients down to a norm, given the norm of the whole model's; 0 leaves them as they are."""
    if not is_sharded(model):
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm or math.inf, norm)
    elif max_norm:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grads_with_norm_
        for parameter in model.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(factor)


def norms_of_shares(gradients: list[Tensor], each: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
    """Return the norm of each gradient, of one that is shared out that of all its shares; `each` is of this process."""
    shared = torch.tensor([isinstance(gradient, DTensor) for gradient in gradients], device=each.device)
    if not shared.any():
        return each
    squares = over_processes(torch.where(shared, each.square(), 0), "sum")
    return torch.where(shared, squares.sqrt(), each)
