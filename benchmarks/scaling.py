"""Plan memory, traffic and time of a step on many GPUs, for the large towers: formulas, no measurement.

    python benchmarks/scaling.py            # the tables of docs/scaling.md
    python benchmarks/scaling.py --write    # put them there

Parameters and FLOPs are those of `softmoe-clip summary`; the formulas and their reasons stand in docs/scaling.md.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parent.parent / "docs/scaling.md"
BEGIN, END = "<!-- begin: python benchmarks/scaling.py --write -->", "<!-- end -->"

MODELS = ("SoftMoE-L-16", "SoftMoE-H-14")
NUM_GPUS = (8, 64, 512)
PER_NODE = 8
BATCH_SIZE = 16_384

# An H100 SXM by its data sheet, one 400 Gb/s port for each; the share of the peak is an assumption.
GPU_BYTES = 80e9
PEAK_FLOPS, SHARE_OF_PEAK = 989e12, 0.4
NODE_BANDWIDTH, NETWORK_BANDWIDTH = 450e9, 50e9  # bytes a second, each way

STATE = 16  # bytes of a parameter: weight, gradient and two moments in float32
HALF, SINGLE = 2, 4  # bytes of a number in bf16, in float32


class Towers(NamedTuple):
    """What the formulas need to know of a model."""

    name: str
    expert_parameters: int
    other_parameters: int
    largest_block: int  # parameters of the largest block
    forward_flops: float  # of one pair
    kept_bytes: float  # of one pair, for backward, in bf16
    slot_numbers: int  # numbers in all slots of all MoE layers, of one picture

    @property
    def parameters(self) -> int:
        return self.expert_parameters + self.other_parameters


class Plan(NamedTuple):
    """One way to spread a model, and what a step of it takes on each GPU."""

    way: str
    chunk: int  # pairs a GPU runs through its towers at once; 0 where not even one fits
    memory: float  # bytes
    inside: float  # bytes that leave a GPU for another of its node, in a step
    across: float  # bytes that leave a GPU for another node
    seconds: float  # of computing

    @property
    def traffic_seconds(self) -> float:
        return self.inside / NODE_BANDWIDTH + self.across / NETWORK_BANDWIDTH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args()
    text = tables()
    if options.write:
        page = PAGE.read_text()
        before, after = page[: page.index(BEGIN)], page[page.index(END) :]
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{after}")
    print(text)


def tables() -> str:
    """Lay all plans out as Markdown, a table for each model."""
    return "\n".join(table(towers(name)) for name in MODELS)


def towers(name: str) -> Towers:
    """Count a model on the meta device."""
    import torch

    from softmoe_clip.config import ModelConfig
    from softmoe_clip.models.create import create_model
    from softmoe_clip.models.summary import summary
    from softmoe_clip.moe.soft import SoftMoE

    counted = summary(name)
    both = counted["image"], counted["text"]
    with torch.device("meta"):
        model = create_model(ModelConfig(name), vocab_size=49_408, context_length=77)
    layers = [module for module in model.modules() if isinstance(module, SoftMoE)]
    experts = sum(parameter.numel() for layer in layers for parameter in layer.experts.parameters())
    return Towers(
        name,
        expert_parameters=experts,
        other_parameters=counted["parameters"] - experts,
        largest_block=max(sum(p.numel() for p in block.parameters()) for block in model.visual.trunk.blocks),
        forward_flops=1e9 * sum(tower["gflops"] for tower in both),
        kept_bytes=sum(tower["memory"]["training_per_example"] for tower in both) * HALF / SINGLE,
        slot_numbers=sum(layer.slot_embed.numel() for layer in layers),
    )


def plans(model: Towers, num_gpus: int) -> list[Plan]:
    """Plan three ways: whole copies, everything sharded, experts spread over as few nodes as hold them."""
    return [whole_copies(model, num_gpus), sharded(model, num_gpus), experts_spread(model, num_gpus)]


def whole_copies(model: Towers, num_gpus: int) -> Plan:
    """Every GPU holds all; gradients are averaged in float32, once in a step."""
    traffic = 2 * SINGLE * model.parameters * (num_gpus - 1) / num_gpus
    return plan("whole copies", model, num_gpus, STATE * model.parameters, lambda chunks: over_links(traffic, num_gpus))


def sharded(model: Towers, num_gpus: int) -> Plan:
    """`sharding: full`: each GPU holds an equal part; in each chunk it gathers block after block in bf16.

    Gradients are summed to their owners in each chunk, since whole ones would not fit between two chunks.
    """
    gathered = (2 * HALF + SINGLE) * model.largest_block  # this block, the next one, the gradient of one

    def traffic(chunks: int) -> tuple[float, float]:
        sent = chunks * (num_passes(chunks) * HALF + SINGLE) * model.parameters * (num_gpus - 1) / num_gpus
        return over_links(sent, num_gpus)

    return plan("all sharded", model, num_gpus, STATE * model.parameters / num_gpus + gathered, traffic)


def experts_spread(model: Towers, num_gpus: int) -> Plan:
    """`expert_parallel`: a group of GPUs shares one set of experts; slots travel there and back in each pass."""
    group = next(size for size in group_sizes(num_gpus) if chunk_that_fits(model, size, num_gpus) or size == num_gpus)
    copies, near = num_gpus // group, min(group, PER_NODE)

    def traffic(chunks: int) -> tuple[float, float]:
        slots = num_passes(chunks) * 2 * HALF * (BATCH_SIZE / num_gpus) * model.slot_numbers
        inside, across = over_links(2 * SINGLE * model.other_parameters * (num_gpus - 1) / num_gpus, num_gpus)
        averaged = 2 * SINGLE * model.expert_parameters / group * (copies - 1) / copies
        return inside + slots * (near - 1) / group, across + slots * (group - near) / group + averaged

    way = f"experts over {group}" + (f", {copies} copies" if copies > 1 else "")
    return plan(way, model, num_gpus, spread_state(model, group), traffic)


def plan(way: str, model: Towers, num_gpus: int, state: float, traffic) -> Plan:
    """Fill the memory that the state leaves with as large a chunk as fits, and count what a step then takes."""
    local = BATCH_SIZE // num_gpus
    chunk = largest_chunk(model, state, local)
    chunks = local // max(1, chunk)
    computing = local * (1 + num_passes(chunks)) * model.forward_flops / (PEAK_FLOPS * SHARE_OF_PEAK)
    return Plan(way, chunk, state + chunk * model.kept_bytes, *traffic(chunks), computing)


def spread_state(model: Towers, group: int) -> float:
    """Bytes of a GPU's part of the experts and of all the rest."""
    return STATE * (model.other_parameters + model.expert_parameters / group)


def chunk_that_fits(model: Towers, group: int, num_gpus: int) -> int:
    """Pairs that fit beside the experts of such a group."""
    return largest_chunk(model, spread_state(model, group), BATCH_SIZE // num_gpus)


def largest_chunk(model: Towers, state: float, local: int) -> int:
    """The largest power of two of pairs whose activations fit beside the state, a tenth of the memory to spare."""
    fitting = [2**k for k in range(15) if state + 2**k * model.kept_bytes < 0.9 * GPU_BYTES and 2**k <= local]
    return max(fitting, default=0)


def num_passes(chunks: int) -> int:
    """Forward and backward; in several chunks one more forward before them, for the embeddings."""
    return 3 if chunks > 1 else 2


def group_sizes(num_gpus: int) -> list[int]:
    """Whole nodes, doubled until all GPUs are one group."""
    return [size for size in (PER_NODE * 2**k for k in range(20)) if size <= num_gpus]


def over_links(traffic: float, num_gpus: int) -> tuple[float, float]:
    """Say where a ring's traffic goes: inside a node, or over the network, which is what it waits for."""
    return (traffic, 0.0) if num_gpus <= PER_NODE else (0.0, traffic)


def table(model: Towers) -> str:
    """Lay the plans of one model out."""
    lines = [
        f"**{model.name}**: {model.parameters / 1e9:.1f} B parameters, {model.expert_parameters / 1e9:.1f} B of them "
        f"in experts; {model.forward_flops / 1e9:.0f} GFLOP forward for a pair",
        "",
        "| GPUs | way | pairs at once | GB of a GPU | GB sent in a node | GB sent across | s computing | s sending |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for num_gpus in NUM_GPUS:
        for found in plans(model, num_gpus):
            cells = [f"{num_gpus}", found.way, f"{found.chunk}", f"{found.memory / 1e9:,.0f}"]
            if found.chunk:
                cells += [f"{amount / 1e9:,.1f}" for amount in (found.inside, found.across)]
                cells += [f"{found.seconds:.2f}", f"{found.traffic_seconds:.2f}"]
            else:
                cells += ["does not fit", "", "", ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
