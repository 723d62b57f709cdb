"""Time the Soft MoE layer against two others from the package index, and against the dense MLP it stands for.

    pip install --no-deps soft-moe-pytorch==0.1.9 soft-mixture-of-experts==0.2.0 colt5-attention
    python benchmarks/moe_layer.py --images 64 --width 384 --tokens 196 --experts 128

Forward and backward, float32 (or --precision bf16). Every layer lives in a process of its own; they take turns, and
medians are compared. On Linux without a GPU each is timed twice: in a plain process, and in one that keeps memory, as
`softmoe-clip train` does (softmoe_clip/launch.py). One large matrix product is timed beside them: what torch's usual
library reaches on that machine at best (ours may take another one: softmoe_clip/moe/products.py).
soft-mixture-of-experts has no layer of two linears: what it puts in its place, a dense first linear and experts for the
second one only, is timed. Peers that are not installed are left out. Results go into a JSON beside this file.

The settings ask for huge pages, which a machine that has run for hours may not have: as root, before,
`echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory` (587 ms, 813 ms without, on the same EPYC).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from machine import machine, write_results
from turns import PLAIN, TUNED, serve, take_turns

SIZES = {"images": 64, "tokens": 196, "width": 384, "experts": 128, "slots": 1}
OURS, DENSE, MATMUL = "softmoe-clip", "dense MLP", "one large matmul"
MATMUL_SIZE = 4096


def main() -> None:
    options = read_options()
    if options.work_on:
        work(options)
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    memories = (PLAIN, TUNED) if device == "cpu" and sys.platform == "linux" else (PLAIN,)
    seconds = take_turns([(name, memory) for name in (*LAYERS, MATMUL) for memory in memories], options.rounds)
    rows = report(options, seconds)
    sizes = {name: getattr(options, name) for name in (*SIZES, "rounds")}
    found = {"machine": machine(device), "torch": torch.__version__, "sizes": sizes, "rows": rows}
    write_results(options.out, {f"{found['machine']}, {options.precision}": found})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {**SIZES, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/moe_layer.json")
    parser.add_argument("--work-on", help=argparse.SUPPRESS)
    return parser.parse_args()


def ours(d: int, f: int, e: int, s: int):
    from softmoe_clip.moe import SoftMoE

    return SoftMoE(d, e, s, hidden=f)


def dense(d: int, f: int, e: int, s: int):
    from torch import nn

    return nn.Sequential(nn.Linear(d, f), nn.GELU(approximate="tanh"), nn.Linear(f, d))


def soft_moe_pytorch(d: int, f: int, e: int, s: int):
    from soft_moe_pytorch import SoftMoE

    return SoftMoE(dim=d, num_experts=e, num_slots=s)


def soft_mixture_of_experts(d: int, f: int, e: int, s: int):
    from soft_mixture_of_experts.soft_moe import SoftMoE
    from torch import nn

    return nn.Sequential(nn.Linear(d, f), nn.GELU(), SoftMoE(f, d, e, s))


LAYERS: dict[str, Callable] = {
    OURS: ours,
    DENSE: dense,
    "soft-moe-pytorch": soft_moe_pytorch,
    "soft-mixture-of-experts": soft_mixture_of_experts,
}


def work(options: argparse.Namespace) -> None:
    """Time one layer, in its own process."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    torch.manual_seed(0)
    if options.work_on == MATMUL:
        factors = torch.randn(3, MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=dtype)
        serve(lambda: matmul_seconds(*factors))
        return
    d, e, s = options.width, options.experts, options.slots
    try:
        layer = LAYERS[options.work_on](d, 4 * d, e, s)
    except ImportError as error:
        print(f"{options.work_on} is left out: {error}", file=sys.stderr)
        return
    tokens = torch.randn(options.images, options.tokens, d, device=device, dtype=dtype)
    layer.to(device, dtype)
    serve(lambda: step_seconds(layer, tokens.clone().requires_grad_()))


def step_seconds(layer: Callable, tokens) -> float:
    """Return the seconds of one forward and backward pass; gradients are made anew, as after `zero_grad`."""
    layer.zero_grad(set_to_none=True)
    return seconds_of(lambda: layer(tokens).sum().backward())


def matmul_seconds(left, right, out) -> float:
    """Return the seconds of one matrix product into memory that is there."""
    import torch

    return seconds_of(lambda: torch.mm(left, right, out=out))


def seconds_of(work: Callable) -> float:
    """Time some work, on a GPU until it is done there."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    begin = perf_counter()
    work()
    synchronize()
    return perf_counter() - begin


def report(options: argparse.Namespace, seconds: dict[tuple[str, str], float]) -> list[dict]:
    """Print a table and return its rows; FLOP/s where the count is known, times as long as ours in the best memory."""
    b, n, d, slots = options.images, options.tokens, options.width, options.experts * options.slots
    # Multiplications and additions; backward has twice those of forward.
    flops = {OURS: 6 * b * (3 * n * slots * d + 8 * slots * d * d), DENSE: 6 * b * 8 * n * d * d}
    flops[MATMUL] = 2 * MATMUL_SIZE**3
    best = min(value for (name, _), value in seconds.items() if name == OURS)
    rows = []
    for (name, memory), value in seconds.items():
        rate = round(flops[name] / value / 1e9, 1) if name in flops else None
        same = seconds[OURS, memory]
        rows.append({"layer": name, "memory": memory, "milliseconds": round(1000 * value, 1), "gflops": rate})
        rows[-1] |= {"times_ours": round(value / same, 3), "times_ours_at_best": round(value / best, 3)}
        shown = "" if rate is None else f"{rate:8.1f} GFLOP/s"
        print(f"{name:24} {memory:6} {1000 * value:9.1f} ms {value / same:6.2f} {value / best:6.2f} x ours {shown}")
    return rows


if __name__ == "__main__":
    main()
