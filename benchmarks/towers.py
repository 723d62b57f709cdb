"""Time whole image towers in inference: Soft MoE B/16 with 128 experts, dense B/16, dense H/14; pictures per second.

    python benchmarks/towers.py --images 32

Every tower lives in a process of its own; they take turns, and medians are compared. float32, or --precision bf16. On
Linux without a GPU all do so twice: in plain processes, then in such as keep memory, as `embed` and `eval` do
(softmoe_clip/launch.py); not all at once, since the Soft MoE tower alone takes 15 GB in float32. --towers
takes other names of timm's. Results go into a JSON beside this file.
"""

import argparse
import sys
from pathlib import Path
from time import perf_counter

from machine import machine, write_results
from turns import PLAIN, TUNED, serve, take_turns

TOWERS = ("softmoe_vit_base_patch16_224", "plain_vit_base_patch16_224", "plain_vit_huge_patch14_224")


def main() -> None:
    options = read_options()
    if options.work_on:
        work(options)
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    memories = (PLAIN, TUNED) if device == "cpu" and sys.platform == "linux" else (PLAIN,)
    rows = [row for memory in memories for row in measured(options, memory)]
    found = {"machine": machine(device), "torch": torch.__version__, "images": options.images, "rows": rows}
    write_results(options.out, {f"{found['machine']}, {options.precision}": found})


def measured(options, memory: str) -> list[dict]:
    """Time all towers in turn in one memory, print a table, and return its rows."""
    seconds = take_turns([(name, memory) for name in options.towers.split(",")], options.rounds)
    first = next(iter(seconds.values()))
    rows = []
    for (name, _), value in seconds.items():
        row = {"tower": name, "memory": memory, "pictures_per_second": round(options.images / value, 3)}
        rows.append(row | {"first_is_faster": round(value / first, 3)})
        print(f"{name:32} {memory:6} {options.images / value:10.2f} pictures/s   the first's: {value / first:.2f} x")
    return rows


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--towers", default=",".join(TOWERS))
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/towers.json")
    parser.add_argument("--work-on", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """Time one tower, in its own process."""
    import timm
    import torch

    import softmoe_clip.plugin  # noqa: F401

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    tower = timm.create_model(options.work_on, num_classes=0).eval().to(device, dtype)
    images = torch.randn(options.images, *tower.default_cfg["input_size"], device=device, dtype=dtype)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    @torch.inference_mode()
    def step() -> float:
        synchronize()
        begin = perf_counter()
        tower(images)
        synchronize()
        return perf_counter() - begin

    serve(step)


if __name__ == "__main__":
    main()
