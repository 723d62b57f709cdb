"""Time the Soft MoE layer against two others from the package index, and against the dense MLP it stands for.

    pip install --no-deps soft-moe-pytorch==0.1.9 soft-mixture-of-experts==0.2.0 colt5-attention
    python benchmarks/moe_layer.py --images 64 --width 384 --tokens 196 --experts 128

Forward and backward, float32 (or --precision bf16), rounds interleaved; the median of each, and ratios within this run.
soft-mixture-of-experts has no layer of two linears: what it offers in its place, a dense first linear and experts for
the second one only, is timed. Peers that are not installed are left out. Results go into a JSON beside this file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

from machine import machine

from softmoe_clip.launch import tune_cpu_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"images": 64, "tokens": 196, "width": 384, "experts": 128, "slots": 1, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/moe_layer.json")
    options = parser.parse_args()
    tune_cpu_memory()  # as training does

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    tokens = torch.randn(options.images, options.tokens, options.width, device=device, dtype=dtype)
    layers = {name: layer.to(device, dtype) for name, layer in built(options).items()}
    seconds = {name: [] for name in layers}
    for number in range(options.rounds + 2):
        for name, layer in layers.items():
            elapsed = timed(layer, tokens.clone().requires_grad_())
            if number >= 2:
                seconds[name].append(elapsed)
    rows = report(options, {name: median(times) for name, times in seconds.items()})
    found = {"machine": machine(device), "torch": torch.__version__, "settings": vars(options) | {"out": None}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    before[f"{device} {options.precision}"] = found | {"rows": rows}
    options.out.write_text(json.dumps(before, indent=1) + "\n")


def built(options) -> dict:
    """Make the layers that can be made here."""
    import torch
    from torch import nn

    from softmoe_clip.moe import SoftMoE

    d, f, e, s = options.width, 4 * options.width, options.experts, options.slots
    layers = {
        "softmoe-clip": SoftMoE(d, e, s),
        "dense MLP": nn.Sequential(nn.Linear(d, f), nn.GELU(approximate="tanh"), nn.Linear(f, d)),
    }
    try:
        from soft_moe_pytorch import SoftMoE as LucidrainsSoftMoE

        layers["soft-moe-pytorch"] = LucidrainsSoftMoE(dim=d, num_experts=e, num_slots=s)
    except ImportError as error:
        print(f"soft-moe-pytorch is left out: {error}")
    try:
        from soft_mixture_of_experts.soft_moe import SoftMoE as FkodomSoftMoE

        experts = FkodomSoftMoE(f, d, e, s)
        layers["soft-mixture-of-experts"] = nn.Sequential(nn.Linear(d, f), nn.GELU(), experts)
    except ImportError as error:
        print(f"soft-mixture-of-experts is left out: {error}")
    torch.manual_seed(0)
    return layers


def timed(layer: Callable, tokens) -> float:
    """Return the seconds of one forward and backward pass; gradients are made anew, as after `zero_grad`."""
    import torch

    layer.zero_grad(set_to_none=True)
    synchronize = torch.cuda.synchronize if tokens.is_cuda else lambda: None
    synchronize()
    begin = perf_counter()
    layer(tokens).sum().backward()
    synchronize()
    return perf_counter() - begin


def report(options, seconds: dict[str, float]) -> dict:
    """Print a table and return its rows: milliseconds, GFLOP/s where the count is known, times slower than ours."""
    b, n, d, e = options.images, options.tokens, options.width, options.experts * options.slots
    macs = {"softmoe-clip": b * (3 * n * e * d + 8 * e * d * d), "dense MLP": b * 8 * n * d * d}
    ours = seconds["softmoe-clip"]
    rows = {}
    for name, value in seconds.items():
        rate = 6 * macs[name] / value / 1e9 if name in macs else None
        rows[name] = {"milliseconds": round(1000 * value, 1), "gflops": rate and round(rate, 1), "ratio": value / ours}
        shown = "" if rate is None else f"{rate:8.1f} GFLOP/s"
        print(f"{name:28} {1000 * value:9.1f} ms   {value / ours:5.2f} x ours {shown}")
    return rows


if __name__ == "__main__":
    main()
