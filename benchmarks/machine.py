"""What a measurement ran on, for the files that hold the numbers."""

import os
import platform
from pathlib import Path


def machine(device: str = "cpu") -> str:
    """Name the GPU, or the processor with its number of cores, the system and the Python."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{os.cpu_count()} cores of {cpu}, {platform.system()}, Python {platform.python_version()}"
