"""Checkpoints of a sharded run: each process writes its part, and any number of processes read them, also one."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from softmoe_clip.data_pipelines.full_disk import GO_ON, raise_if_full
from softmoe_clip.training.sharding import share_of

PARTS = "shard-*.safetensors"  # as torch's HuggingFaceStorageWriter calls them
State = dict[str, Tensor]


def write_parts(folder: Path, states: Mapping[str, State]) -> None:
    """Write this process's part of some states, named, into a folder; all processes must call this together.

    An older folder is removed. Raises OSError, in all of them, where one process cannot write, or where they do not
    see each other's files.
    """
    import torch.distributed.checkpoint as dcp

    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    tensors = {f"{state}/{name}": tensor for state, entries in states.items() for name, tensor in entries.items()}
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except dcp.api.CheckpointException as error:  # no Exception, so that nothing else would take it for one
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0]
        raise_if_full(reason, folder, GO_ON)
        raise OSError(f"a process cannot write its part of {folder}: {' '.join(str(reason).split())}") from None
    dist.barrier()
    found = len([*folder.glob(PARTS)])
    dist.barrier()  # all have counted: the main process may now give the folder its name
    if found != dist.get_world_size():
        raise OSError(
            f"{folder} holds the parts of {found} of {dist.get_world_size()} processes: with sharding, out (or "
            "working_folder) must be a folder that all machines share"
        )


def is_in_parts(folder: Path) -> bool:
    """Tell whether a checkpoint was written by a sharded run."""
    return any(folder.glob(PARTS))


def read_parts(folder: Path, model: nn.Module) -> dict[str, State]:
    """Read what `write_parts` wrote: of what `model` has shared out only this process's share, of all else all."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    parameters = dict(model.named_parameters())
    tensors = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        like = parameters.get(parameter_of(key.partition("/")[2]))
        if isinstance(like, DTensor) and like.shape == stored.size:
            tensors[key] = torch.empty_like(like.detach(), dtype=stored.properties.dtype)
        else:
            tensors[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            dcp.load(tensors, storage_reader=reader, no_dist=True)  # no talk: each process sees all files
    except dcp.api.CheckpointException as error:
        raise ValueError(str(next(iter(error.failures.values()))[0])) from None
    states: dict[str, State] = {}
    for key, tensor in tensors.items():
        state, _, name = key.partition("/")
        states.setdefault(state, {})[name] = tensor
    return states


def read_shares(file: Path, model: nn.Module) -> State:
    """Read a file of whole tensors; of what `model` has shared out this process keeps its share."""
    parameters = dict(model.named_parameters())
    return {
        key: share_of(tensor, like) if (like := parameters.get(parameter_of(key))) is not None else tensor
        for key, tensor in load_file(file).items()
    }


def parameter_of(key: str) -> str:
    """Return the parameter that a tensor belongs to, itself or as a part of an optimizer's state."""
    return key.partition("|")[0]
