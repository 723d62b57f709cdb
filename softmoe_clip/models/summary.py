"""What a model costs, tower by tower, before it is built: everything is counted on the meta device."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from softmoe_clip.config import ModelConfig
from softmoe_clip.models.alike import experts_of
from softmoe_clip.models.complexity import Complexity, image_complexity, num_parameters, text_complexity
from softmoe_clip.models.create import OUR_TEXT, build, folder_config
from softmoe_clip.models.hub import refuse_url
from softmoe_clip.models.store import check_known, described_on_hub, read_folder, without_downloads
from softmoe_clip.models.written import TOWERS
from softmoe_clip.moe.experts import Experts

FLOAT32 = 4  # bytes
LOADS_WITH = {
    "open_clip": "open_clip",
    "softmoe_clip.plugin": "open_clip, after `import softmoe_clip.plugin`",
    "softmoe_clip.load": (
        "softmoe_clip.load: MoE layers outside a registered timm tower, our text tower, or one from a folder"
    ),
}
COUNTED = """\
On an expert's path: all that one token's way through the tower uses, with one expert per MoE layer (the K of a top-K
router). GFLOP: 2 x multiply-accumulates of one picture, or caption, of full length. Memory is in float32. Inference:
weights and the largest operation of one example. Training: weights, gradients and both moments of AdamW; beside that,
what backward needs of each example with plain attention. No workspaces, no temporaries of the optimizer."""


def summary(name: str) -> dict:
    """Count both towers of an architecture name, an open_clip JSON file, a folder, a run, a NAME:TAG, a hf-hub:NAME.

    `image` and `text` hold `parameters`, `expert_path_parameters` (see `expert_path_parameters`), `gflops` and `memory`
    in bytes; `loads_with` is `open_clip`, `softmoe_clip.plugin` (open_clip after that import) or `softmoe_clip.load`.
    Raises ValueError for a name or file that describes no model.
    """
    folder, written = described(name)
    model, image, text = counted(without_downloads(written, folder), name)
    return {
        "model": name,
        "image": tower_summary(model.visual, image),
        "text": tower_summary(model.text, text),
        "parameters": num_parameters(model),
        "loads_with": loads_with(written),
    }


def counted(written: dict, source: str) -> tuple[nn.Module, Complexity, Complexity]:
    """Return a described model on the meta device, and what its towers cost on a picture and a caption of full length.

    Its text tower is a module of its own, also where open_clip's model has the parts of it lie about.
    """
    written = written | {"model_cfg": written["model_cfg"] | {"custom_text": True}}
    with torch.device("meta"):
        model = build(written, source=source).eval()
    context_length = written["model_cfg"]["text_cfg"].get("context_length", 77)
    image = image_complexity(model.visual, model.visual.image_size)
    return model, image, text_complexity(model.text, context_length)


def described(name: str) -> tuple[Path | None, dict]:
    """Return the folder of a model, where it has one, and what its `open_clip_config.json` holds, or would hold."""
    refuse_url(name)
    folder = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") or folder.is_dir():
        return read_folder(folder)
    if name.startswith("hf-hub:"):
        return described_on_hub(name)
    if ":" in name:
        import open_clip

        name, tag = name.rsplit(":", 1)
        written = folder_config(ModelConfig(name))
        check_known(f"tag of {name}", tag, open_clip.list_pretrained_tags_by_model(name))
        return None, written
    return None, folder_config(ModelConfig(name))


def tower_summary(tower: nn.Module, cost: Complexity) -> dict:
    """Put one tower's numbers together."""
    weights = FLOAT32 * cost.num_parameters
    return {
        "parameters": cost.num_parameters,
        "expert_path_parameters": expert_path_parameters(tower),
        "gflops": cost.flops / 1e9,
        "memory": {
            "inference": weights + cost.largest_bytes,
            "training": 4 * weights,
            "training_per_example": cost.kept_bytes,
        },
    }


def expert_path_parameters(tower: nn.Module) -> int:
    """Count the parameters on the way of one token when each MoE layer is entered through one expert (K for top-K).

    Routers, shared experts and all that is outside MoE layers count in full. In a Soft MoE layer every token has a part
    in every slot; the path is then that of one slot, which meets one expert.
    """
    unused = 0
    for layer in tower.modules():
        if isinstance(experts := getattr(layer, "experts", None), Experts):
            num_experts = experts.w_in.shape[0]
            used = min(getattr(layer, "top_k", 1), num_experts)
            unused += num_parameters(experts) * (num_experts - used) // num_experts
    return num_parameters(tower) - unused


def loads_with(written: dict) -> str:
    """Say what it takes to load such a model: one of LOADS_WITH."""
    from softmoe_clip.plugin import TIMM_NAMES

    text_cfg = written["model_cfg"]["text_cfg"]
    # open_clip looks for the text tower where it came from, and not in the model folder.
    moved = Path(text_cfg.get("hf_model_name") or "").is_absolute()
    if moved or OUR_TEXT in text_cfg or any(experts_of(written, tower) for tower in TOWERS):
        return "softmoe_clip.load"
    ours = written["model_cfg"]["vision_cfg"].get("timm_model_name") in TIMM_NAMES
    return "softmoe_clip.plugin" if ours else "open_clip"


def print_summary(result: dict, as_json: bool = False) -> None:
    """Print the numbers as a table with a word on what they count, or as JSON."""
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(result["model"])
    for name in ("image", "text"):
        table.add_column(f"{name} tower", justify="right")
    towers = result["image"], result["text"]
    table.add_row("parameters", *(f"{tower['parameters']:,}" for tower in towers))
    table.add_row("on an expert's path", *(f"{tower['expert_path_parameters']:,}" for tower in towers))
    table.add_row("forward GFLOP", *(f"{tower['gflops']:,.2f}" for tower in towers))
    table.add_row("memory, inference", *(as_size(tower["memory"]["inference"]) for tower in towers))
    table.add_row("memory, training", *(as_size(tower["memory"]["training"]) for tower in towers))
    table.add_row("  and per example", *(as_size(tower["memory"]["training_per_example"]) for tower in towers))
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(f"{result['parameters']:,} parameters in all. Loads with {LOADS_WITH[result['loads_with']]}.")
    print(COUNTED)


def as_size(num_bytes: int) -> str:
    """Write a number of bytes as people read it."""
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
