"""What a benchmark ran on, and where its numbers go."""

import json
import os
import platform
from pathlib import Path


def machine(device: str = "cpu") -> str:
    """Name the GPU, or the processor and its cores, with the system and the version of Python."""
    if device == "cuda":
        import torch

        chip = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
        wide = " with AVX-512" if any(line.startswith("flags") and " avx512f " in line for line in lines) else ""
        chip = f"{os.cpu_count()} cores of {cpu}{wide}"
    return f"{chip}, {platform.system()}, Python {platform.python_version()}"


def write_results(out: Path, found: dict) -> None:
    """Put numbers into a JSON file; those under other keys, which another run has written, stay."""
    before = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(before | found, indent=1) + "\n")
