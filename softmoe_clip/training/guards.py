"""Stop before numbers that are none reach a checkpoint, and write down what led there; gradient norms by tower."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from softmoe_clip.data_pipelines.loader import Batch
from softmoe_clip.moe.stats import collect_routing
from softmoe_clip.training.distributed import gather_objects, rank
from softmoe_clip.training.expert_parallel import Mesh, whole_norms
from softmoe_clip.training.sharding import local, norms_of_shares

KEYS_TOLD = 16  # in the sentence; the file has all
LISTED = 50  # names of parameters or gradients that are not finite


class GradientNorms(NamedTuple):
    """The norm of all gradients together, and of each parameter's own."""

    total: Float[Tensor, ""]
    each: Float[Tensor, " parameters"]
    names: list[str]

    def by_tower(self) -> dict[str, float]:
        """Give the norms for a log: `gradient_norm`, and of what is trained in `visual`, `text` and `others`."""
        towers: dict[str, list[int]] = {}
        for place, name in enumerate(self.names):
            towers.setdefault(tower_of(name), []).append(place)
        norms = {f"gradient_norm/{tower}": self.each[places].norm().item() for tower, places in sorted(towers.items())}
        return {"gradient_norm": self.total.item(), **norms}

    def not_finite(self) -> list[str]:
        """List the parameters whose gradients hold NaN or infinity; at most LISTED of them."""
        return [self.names[place] for place in (~self.each.isfinite()).nonzero().flatten().tolist()][:LISTED]


def tower_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to; open_clip's `CLIP` has its text tower at the top."""
    top = name.partition(".")[0]
    return "visual" if top == "visual" else "others" if top.startswith("logit_") else "text"


def gradient_norms(model: nn.Module, mesh: Mesh | None = None) -> GradientNorms:
    """Measure the gradients in one pass; `total` has the bits that torch's clip_grad_norm_ would find.

    Of what is spread or shared out over processes the norms are those of the whole, the same in every process.
    """
    found = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    names, gradients = [name for name, _ in found], [gradient for _, gradient in found]
    each = torch.stack(
        [norm.to(gradients[0].device) for norm in torch._foreach_norm([local(g) for g in gradients], 2.0)]
    )
    each = norms_of_shares(gradients, whole_norms(names, each, model, mesh))
    return GradientNorms(torch.linalg.vector_norm(each), each, names)


def must_stop(gradient_norm: float, accelerator) -> bool:
    """Return whether a gradient norm ends the run: one that is not finite, but in fp16 only a lasting one.

    There Accelerate skips the step and halves the loss scale; below 1 the gradients themselves are not finite.
    """
    is_skipped = accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1
    return not math.isfinite(gradient_norm) and not is_skipped


def not_finite(
    what: str,
    value: float,
    *,
    run: Path,
    step: int,
    batch: Batch,
    towers: nn.Module,
    again: Callable[[], Any],
    together: bool,
    numbers: dict[str, int | float],
    norms: GradientNorms | None = None,
) -> ValueError:
    """Write `run/not_finite/step_00000005.json` and return the error for every process to raise, the same in all.

    All processes must call this together. `again` computes the outputs of this process's part once more, so that the
    first module whose output is not finite can be named; `together` tells that it takes all processes. `numbers` are
    what the step would have logged.
    """
    parts = gather_objects(part_of_process(batch, towers))
    file = run / "not_finite" / f"step_{step:08d}.json"
    record = {
        "what": what,
        "value": value,
        "step": step,
        **numbers,
        **(norms.by_tower() if norms else {}),
        "parameters_not_finite": found_anywhere(parts),
        "gradients_not_finite": norms.not_finite() if norms else None,
        "processes": parts,
    }
    told = f"{what} is {value} at step {step}, sample keys {some_keys(parts)}: lower optim.lr"
    written = written_by_main(file, record)
    try:
        seen = look_again(towers, again)
    except Exception as failure:  # out of memory, above all
        if together:  # the others wait inside, or have failed too, since one has left: what is known stands in the file
            return ValueError(f"{told}; {written}")
        reason = " ".join(str(failure).split())[:200] or type(failure).__name__
        seen = {"problem": f"the step could not be computed again: {reason}"}
    for part, found in zip(parts, gather_objects(seen), strict=True):
        part |= found
    return ValueError(f"{told}; {written_by_main(file, record)}")


def some_keys(parts: list[dict[str, Any]]) -> str:
    """Name the first pairs of a global batch."""
    keys = [pair["key"] for part in parts for pair in part["pairs"]]
    return " ".join(keys[:KEYS_TOLD]) + (f" and {len(keys) - KEYS_TOLD:,} more" if len(keys) > KEYS_TOLD else "")


def written_by_main(file: Path, record: dict) -> str:
    """Let the main process write, and all know what came of it: nobody leaves before the file stands."""
    return gather_objects(write_record(file, record) if rank() == 0 else "")[0]


def write_record(file: Path, record: dict) -> str:
    """Write what is known, and say where; a full disk must not hide the reason for the stop."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(plain(record), indent=1, ensure_ascii=False) + "\n"
        file.write_text(text, "utf-8", "backslashreplace")  # a key need not be UTF-8
    except OSError as error:
        return f"{file} could not be written ({error.strerror})"
    return f"what led there stands in {file}"


def part_of_process(batch: Batch, towers: nn.Module) -> dict[str, Any]:
    """Return what this process alone knows: its pairs, and parameters that are not finite.

    What fails on the way is told in `problem`: the others wait for this part.
    """
    places = zip(batch.positions, batch.keys, batch.captions, strict=True)
    part = {
        "rank": rank(),
        "first_output_not_finite": None,
        "problem": "the step could not be computed again",  # until it has been
        "parameters_not_finite": [],
        "routing": {},
        "pairs": [{"position": position, "key": key, "caption": caption} for position, key, caption in places],
    }
    try:
        part["parameters_not_finite"] = tensors_not_finite({name: local(p) for name, p in towers.named_parameters()})
    except Exception as error:
        part["problem"] = " ".join(str(error).split())[:200] or type(error).__name__
    return part


def look_again(towers: nn.Module, again: Callable[[], Any]) -> dict[str, Any]:
    """Return where this process's numbers go wrong when they are computed again, and its routing."""
    with torch.no_grad(), collect_routing() as collected, first_output_not_finite(towers) as found:
        again()
    return {"first_output_not_finite": found[0] if found else None, "problem": None, "routing": collected.means()}


def found_anywhere(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take the parameters that are not finite out of what processes know, each once: shares differ between them."""
    found = {entry["name"]: entry for part in parts for entry in part.pop("parameters_not_finite")}
    return [*found.values()][:LISTED]


@contextmanager
def first_output_not_finite(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Watch every module; the list gets one entry, for the first that gives a number that is none.

    Modules report as they end, the inner ones first: what is found is the innermost place. Where its inputs are not
    finite either, the numbers went wrong between modules, or before.
    """
    found: list[dict[str, Any]] = []

    def watch(name: str):
        def hook(module, inputs, output):
            if not found and (wrong := tensors_not_finite(dict(enumerate(tree_leaves(output))))):
                kind = type(module).__name__
                finite_input = not tensors_not_finite(dict(enumerate(tree_leaves(inputs))))
                del wrong[0]["name"]
                found.append({"module": name, "type": kind, "inputs_finite": finite_input, **wrong[0]})

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def tensors_not_finite(tensors: dict[Any, Any]) -> list[dict[str, Any]]:
    """List the floating tensors that hold NaN or infinity, and how many of each; at most LISTED of them."""
    listed = []
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            counts = {"nan": int(tensor.isnan().sum()), "inf": int(tensor.isinf().sum()), "of": tensor.numel()}
            listed.append({"name": name, "shape": list(tensor.shape), **counts})
    return listed[:LISTED]


def plain(value: Any) -> Any:
    """Return what JSON can hold: it knows neither NaN nor infinity, so that these become words."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
