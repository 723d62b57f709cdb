"""Refuse layers that this machine cannot hold, before anything is built."""

import os
from pathlib import Path

import torch

FLOAT32 = 4  # bytes
# What a container may use, on Linux; "max" where there is no limit.
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(num_floats: int, what: str, purpose: str = "") -> None:
    """Raise ValueError where so many new numbers do not fit into this machine's memory; meta tensors always do."""
    if torch.get_default_device().type != "cpu":
        return
    need, have = FLOAT32 * num_floats, machine_memory()
    if need > have:
        raise ValueError(
            f"{what} need {need / 2**30:,.1f} GiB{purpose}, this machine has {have / 2**30:,.1f} GiB: "
            "take fewer experts, slots or layers"
        )


def machine_memory() -> int:
    """Return the bytes of memory of this machine, or of this container."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 2**63
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical
