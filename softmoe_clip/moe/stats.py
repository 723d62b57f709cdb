"""Routing statistics and auxiliary losses, through one explicit collector: a layer reports only while one is open."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import log

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

# An expert is dead where it gets less than this part of an equal share. In the paper's own layers (arXiv 2308.00951,
# appendix on inspection) the mean combine weights of experts differ by 3 to 14 times: a hundredth is far outside.
DEAD_SHARE = 0.01

_open: list["CollectedRouting"] = []


class CollectedRouting:
    """What the layers reported while the collector was open."""

    def __init__(self, statistics: bool = True):
        self.statistics = statistics
        self.reports: dict[str, list[dict[str, Tensor]]] = {}
        self.losses: dict[str, list[dict[str, Tensor]]] = {}
        self.weights: dict[str, dict[str, float]] = {}

    def aux_loss(self) -> Float[Tensor, ""]:
        """Add up the layers' weighted auxiliary losses, each the mean over all its groups; 0 where there are none."""
        total = torch.zeros(())
        for label, calls in self.losses.items():
            for name, weight in self.weights[label].items():
                if weight and name in calls[0]:
                    total = total + weight * torch.cat([losses[name] for losses in calls]).mean()
        return total

    def means(self, over: Callable[[Tensor], Tensor] = Tensor.clone) -> dict[str, dict[str, float]]:
        """Average each statistic of each layer over its calls; experts are dead in all of them together.

        `over` averages the numbers of all processes, too, in one exchange.
        """
        if not self.reports:
            return {}
        means = [
            (label, name, torch.stack([report[name] for report in reports]).mean(0))
            for label, reports in self.reports.items()
            for name in reports[0]
        ]
        numbers = over(torch.cat([mean.flatten() for _, _, mean in means])).cpu()  # all of them in one go
        found: dict[str, dict[str, float]] = {label: {} for label in self.reports}
        for (label, name, _), part in zip(means, numbers.split([mean.numel() for *_, mean in means]), strict=True):
            if name == "usage":
                found[label]["dead_experts"] = (part < DEAD_SHARE / len(part)).float().mean().item()
            else:
                found[label][name] = part.item()
        return found

    def summary(self, over: Callable[[Tensor], Tensor] = Tensor.clone) -> dict[str, float]:
        """Give the same numbers flat, for a log: `routing/<layer>/<statistic>`."""
        means = self.means(over)
        return {f"routing/{label}/{name}": value for label, values in means.items() for name, value in values.items()}


@contextmanager
def collect_routing(statistics: bool = True) -> Iterator[CollectedRouting]:
    """Open a collector: every MoE layer that runs inside reports under its label, a sparse one its losses as well.

    Soft layers: `dispatch_entropy`, `combine_entropy` (1 is uniform), `dispatch_max`, `combine_max` (mean largest
    weight of a slot, of a token), `slot_similarity` (mean cosine of the inputs of two slots of one image),
    `dead_experts` (share of experts whose slots together get less than DEAD_SHARE / e of all combine weights),
    `router_scale`. Sparse ones: `gate_entropy`, `gate_max`, `dropped` (share of tokens that no expert took), `filled`
    (share of slots that hold a token), `load_max`, `load_min` (tokens of the busiest and the idlest expert, 1 is the
    mean), `dead_experts` (the same of tokens taken), and their losses. Without `statistics` only what `aux_loss` needs
    is collected.
    """
    collected = CollectedRouting(statistics)
    _open.append(collected)
    try:
        yield collected
    finally:
        _open.remove(collected)


def is_collecting() -> bool:
    """True while at least one open collector wants statistics."""
    return any(collected.statistics for collected in _open)


def is_recomputing() -> bool:
    """True inside a backward pass, where gradient checkpointing runs layers a second time."""
    # A compiled graph cannot ask. It need not, as long as the collector is closed before the backward pass begins.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def report_losses(label: str, losses: dict[str, Float[Tensor, " g"]], weights: dict[str, float]) -> None:
    """Give a layer's losses to every open collector, once; they are weighted there.

    Nothing is computed here: gradient checkpointing must save the same tensors with and without a collector.
    """
    if losses and not is_recomputing():
        for collected in _open:
            collected.losses.setdefault(label, []).append(losses)
            collected.weights[label] = weights


def add_statistics(label: str, statistics: dict[str, Tensor]) -> None:
    """Give a layer's statistics to every open collector that wants them."""
    if not is_recomputing():
        for collected in _open:
            if collected.statistics:
                report = {name: value.detach().float() for name, value in statistics.items()}
                collected.reports.setdefault(label, []).append(report)


# no_grad saves nothing for backward, so that gradient checkpointing sees the same graph with and without a collector.
@torch.no_grad()
def report(
    label: str,
    dispatch: Float[Tensor, "b n e s"],
    combine: Float[Tensor, "b n e s"],
    slots: Float[Tensor, "b slots d"],
    router_scale: Float[Tensor, ""] | None,
    mask: Bool[Tensor, "b n"] | None,
) -> None:
    """Give one layer's statistics to every open collector; padding and examples of it alone are left out.

    `slots` are the experts' inputs.
    """
    per_expert = combine.sum(3)
    dispatch, combine = dispatch.flatten(2), combine.flatten(2)
    # Products with 0 and 1 instead of indexing: shapes that depend on the data would break a compiled graph.
    real = dispatch.new_ones(dispatch.shape[:2]) if mask is None else mask.to(dispatch.dtype)
    lengths = real.sum(1)
    examples = (lengths > 0) / (lengths > 0).sum().clamp(min=1)
    tokens = real / lengths.sum().clamp(min=1)
    # A lone token, or a lone slot, has nothing to choose between: its entropy is 0, not 0 / 0.
    dispatch_entropy = torch.special.entr(dispatch).sum(1).mean(1) / lengths.log().clamp(min=1e-30)
    combine_entropy = torch.special.entr(combine).sum(2) / max(log(combine.shape[2]), 1e-30)
    usage = (per_expert * tokens[..., None]).sum((0, 1))
    statistics = {
        "dispatch_entropy": (dispatch_entropy * examples).sum(),
        "combine_entropy": (combine_entropy * tokens).sum(),
        "dispatch_max": (dispatch.amax(1).mean(1) * examples).sum(),
        "combine_max": (combine.amax(2) * tokens).sum(),
        "slot_similarity": (mean_cosine(slots) * examples).sum(),
        "usage": usage,
    }
    if router_scale is not None:
        statistics["router_scale"] = router_scale.clone()
    add_statistics(label, statistics)


def mean_cosine(slots: Float[Tensor, "b slots d"]) -> Float[Tensor, " b"]:
    """Return the mean cosine over all pairs of different slots, 0 where there is no pair; an empty slot is left out."""
    # The sum over all pairs is the squared length of the sum: as cheap as one pass, without a (slots, slots) matrix.
    directions = F.normalize(slots.float(), dim=2)
    num_filled = directions.square().sum((1, 2))
    pairs = directions.sum(1).square().sum(1) - num_filled
    return pairs / (num_filled * (num_filled - 1)).clamp(min=1)


@torch.no_grad()
def report_sparse(
    label: str,
    dispatch: Bool[Tensor, "g m e s"],
    gates: Float[Tensor, "g m e"],
    aux_losses: dict[str, Float[Tensor, " g"]],
) -> None:
    """Give one sparse layer's statistics to every open collector; its `gates` are those without noise."""
    loads = dispatch.sum((1, 3)).float()
    loads = loads / loads.mean(1, keepdim=True).clamp(min=1e-30)
    statistics = {
        "gate_entropy": torch.special.entr(gates).sum(2).mean() / max(log(gates.shape[2]), 1e-30),
        "gate_max": gates.amax(2).mean(),
        "dropped": 1 - dispatch.flatten(2).any(2).float().mean(),
        "filled": dispatch.any(1).float().mean(),
        "load_max": loads.amax(1).mean(),
        "load_min": loads.amin(1).mean(),
        "usage": dispatch.sum((0, 1, 3)) / dispatch.sum().clamp(min=1),
    }
    add_statistics(label, statistics | {f"{name}_loss": loss.mean() for name, loss in aux_losses.items()})
