"""An optimizer's state as named tensors, exact for any optimizer that holds tensors and numbers, and back again."""

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from softmoe_clip.training.sharding import share_of

GROUP = "group "  # no parameter has a space in its name
ALL_GROUPS = f"{GROUP}all"  # older checkpoints have a copy for each: group 0, group 1, ...
SETTINGS = {"params", "lr", "lr_scale", "weight_decay"}  # of a group: the run's config has them, no step changes them
# Numbers that are no tensors: what a tensor of them is called in the file, how it is made, how it is read.
NUMBERS = {bool: ("bool", torch.bool), int: ("int", torch.int64), float: ("float", torch.float64)}


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds the state: inside Accelerate's wrapper and timm's Lookahead."""
    for wrapped in ("optimizer", "_base_optimizer"):
        optimizer = getattr(optimizer, wrapped, optimizer)
    return optimizer


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state as tensors named `<parameter>|<entry>`, independent of group order; numbers end in `|int`.

    What steps have written into the groups, as LAMB its step, is called `group all|<entry>`: one copy, as all groups
    step together. Raises ValueError where they differ, and for anything that is neither a tensor nor a number.
    """
    inner = innermost(optimizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for entry, value in inner.state.get(parameter, {}).items():
            tensors |= as_tensor(f"{name}|{entry}", value)
    in_groups = same_in_all([group_tensors(group, inner.defaults) for group in inner.param_groups])
    return tensors | {f"{ALL_GROUPS}|{entry}": tensor for entry, tensor in in_groups.items()}


def group_tensors(group: dict, defaults: dict) -> dict[str, Tensor]:
    """Return what steps have written into a group."""
    tensors: dict[str, Tensor] = {}
    for entry in group.keys() - SETTINGS:
        if entry not in defaults or differs(group[entry], defaults[entry]):
            tensors |= as_tensor(entry, group[entry])
    return tensors


def same_in_all(groups: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what each group holds; raises ValueError where they do not all hold the same."""
    first, *others = groups or [{}]
    for other in others:
        for entry in sorted(first.keys() | other.keys()):
            if entry not in first or entry not in other or not torch.equal(first[entry], other[entry]):
                raise ValueError(f"the optimizer's parameter groups have not all the same {entry.partition('|')[0]}")
    return first


def differs(value: object, default: object) -> bool:
    """Tell what a step has changed from what stands in the group from the start."""
    return isinstance(value, Tensor) or (value is not default and value != default)


def as_tensor(key: str, value: object) -> dict[str, Tensor]:
    """Return a tensor under its key, a number as a tensor of nothing else, nothing (None) as no value at all."""
    if isinstance(value, Tensor):
        return {key: value}
    if value is None:
        return {f"{key}|none": torch.empty(0)}
    if type(value) not in NUMBERS:
        raise ValueError(f"it keeps a {type(value).__name__} ({key}), which a checkpoint cannot hold")
    kind, dtype = NUMBERS[type(value)]
    return {f"{key}|{kind}": torch.tensor(value, dtype=dtype)}


def fill_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned, for any grouping of the parameters.

    Raises RuntimeError where it is not of this model, ValueError for an older checkpoint whose groups differ.
    """
    inner, parameters = innermost(optimizer), dict(model.named_parameters())
    groups = {parameter: group for group in inner.param_groups for parameter in group["params"]}
    inner.state.clear()
    in_groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, entry = key.partition("|")
        if owner.startswith(GROUP):
            in_groups.setdefault(owner, {})[entry] = tensor
        elif owner not in parameters:
            raise RuntimeError(f"no parameter is called {owner}")
        elif (group := groups.get(parameters[owner])) is not None:  # a branch may freeze what its trunk trained
            entry, value = from_tensor(entry, tensor)
            inner.state[parameters[owner]][entry] = placed(entry, value, parameters[owner], group)
    for key, tensor in same_in_all([*in_groups.values()]).items():
        for group in inner.param_groups:
            entry, value = from_tensor(key, tensor.clone())  # each its own, as steps count in place
            group[entry] = value


def from_tensor(key: str, tensor: Tensor) -> tuple[str, Tensor | int | float | None]:
    """Return what `as_tensor` was given."""
    entry, _, kind = key.partition("|")
    return entry, tensor if not kind else None if kind == "none" else tensor.item()


def placed(entry: str, value: object, parameter: nn.Parameter, group: dict) -> object:
    """Move a tensor to its parameter's device; a step counter stays on the CPU unless kernels read it, as in torch."""
    if not isinstance(value, Tensor) or (entry == "step" and not (group.get("fused") or group.get("capturable"))):
        return value
    return value.to(parameter.device)


def rehearse(make: Callable[[list[dict]], Optimizer]) -> None:
    """Take a few steps on toy parameters, with a save in between; ValueError if they are not the same after it.

    So an optimizer that cannot be resumed exactly is refused before a run begins, not at its first checkpoint.
    """
    model, optimizer = toy(make)
    for hidden in vars(innermost(optimizer)).values():
        if isinstance(hidden, random.Random | torch.Generator):
            raise ValueError("it draws random numbers of its own, which a checkpoint does not hold")
    toy_steps(model, optimizer, 3)
    twin, twin_optimizer = toy(make)
    twin.load_state_dict(model.state_dict())
    saved = optimizer_tensors(model, optimizer)
    fill_optimizer(twin, twin_optimizer, {key: tensor.clone() for key, tensor in saved.items()})
    toy_steps(model, optimizer, 4)
    toy_steps(twin, twin_optimizer, 4)
    if any(not torch.equal(parameter, twin[name]) for name, parameter in model.items()):
        raise ValueError("its steps are not the same after it is saved and loaded")


def rehearse_shares(make: Callable[[list[dict]], Optimizer], mesh: DeviceMesh) -> None:
    """Take the toy's steps with parameters that are shared out; ValueError if they are not those of whole ones.

    So an optimizer is refused that looks at a share as if it were the whole, or that cannot go on from whole state.
    All processes of the mesh must call this together.
    """
    start, (model, optimizer) = toy(make, LARGE)[0], toy(make, LARGE)
    (shares, share_optimizer), (twin, twin_optimizer) = (toy(make, LARGE, mesh) for _ in range(2))
    toy_steps(shares, share_optimizer, 3)
    twin.load_state_dict(shares.state_dict())
    saved = {key: whole_tensor(tensor).clone() for key, tensor in optimizer_tensors(shares, share_optimizer).items()}
    shared = {key: share_of(tensor, shares[key.partition("|")[0]]) for key, tensor in saved.items() if GROUP not in key}
    fill_optimizer(twin, twin_optimizer, saved | shared)
    toy_steps(model, optimizer, 5)
    toy_steps(twin, twin_optimizer, 2)
    for name, share in twin.items():
        change, expected = whole_tensor(share).cpu() - start[name], model[name] - start[name]
        if (change - expected).abs().max() > 1e-3 * expected.abs().max() + 1e-8:
            raise ValueError("its steps are not the same where parameters are shared out")


def whole_tensor(tensor: Tensor) -> Tensor:
    """Put a tensor together, if it is shared out."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


SMALL = {"matrix": (4, 3), "experts": (2, 4, 3), "bias": (3,), "scale": ()}
# From 128 rows and columns on, optimizers keep less of a matrix than all its moments.
LARGE = {"matrix": (136, 130), "experts": (2, 136, 130), "bias": (3,), "scale": ()}


@torch.no_grad()
def toy(
    make: Callable[[list[dict]], Optimizer], shapes: dict[str, tuple[int, ...]] = SMALL, mesh: DeviceMesh | None = None
) -> tuple[nn.ParameterDict, Optimizer]:
    """Make an optimizer of parameters of every kind that a tower has, in two groups, shared out over a mesh or not."""
    start = {name: torch.linspace(0.1, 1.0, math.prod(shape)).view(shape) for name, shape in shapes.items()}
    if mesh is not None:
        start = {name: shared_out(tensor, mesh) for name, tensor in start.items()}
    model = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in start.items()})
    parameters = list(model.values())
    groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
    return model, make([group | {"lr_scale": 1.0} for group in groups])


def shared_out(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Leave this process its rows of a tensor, as fully_shard would."""
    tensor = tensor.to(mesh.device_type)
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None) if tensor.dim() else tensor


def toy_steps(model: nn.ParameterDict, optimizer: Optimizer, num_steps: int) -> None:
    """Take steps along gradients that are a function of the parameters, so that a difference grows."""
    for _ in range(num_steps):
        for parameter in model.values():
            parameter.grad = torch.cos(7 * parameter.detach())
        optimizer.step()
