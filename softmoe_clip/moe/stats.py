"""Routing statistics through one explicit collector: a layer reports only while somebody has opened one."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import log

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_open: list["CollectedRouting"] = []


class CollectedRouting:
    """What the layers reported while the collector was open."""

    def __init__(self):
        self.reports: dict[str, list[dict[str, Tensor]]] = {}

    def means(self) -> dict[str, dict[str, float]]:
        """Average each statistic of each layer over its calls; a recomputed call only repeats its numbers."""
        return {
            label: {name: torch.stack([report[name] for report in reports]).mean().item() for name in reports[0]}
            for label, reports in self.reports.items()
        }

    def summary(self) -> dict[str, float]:
        """Give the same numbers flat, for a log: `routing/<layer>/<statistic>`."""
        return {
            f"routing/{label}/{name}": value for label, values in self.means().items() for name, value in values.items()
        }


@contextmanager
def collect_routing() -> Iterator[CollectedRouting]:
    """Open a collector: every MoE layer that runs inside reports `dispatch_entropy`, `combine_entropy` (1 is uniform),
    `dispatch_max`, `combine_max` (mean largest weight of a slot, of a token) and `router_scale` under its label."""
    collected = CollectedRouting()
    _open.append(collected)
    try:
        yield collected
    finally:
        _open.remove(collected)


def is_collecting() -> bool:
    """True while at least one collector is open."""
    return bool(_open)


# no_grad saves nothing for backward, so that gradient checkpointing sees the same graph with and without a collector.
@torch.no_grad()
def report(
    label: str,
    dispatch: Float[Tensor, "b n e s"],
    combine: Float[Tensor, "b n e s"],
    router_scale: Float[Tensor, ""],
    mask: Bool[Tensor, "b n"] | None,
) -> None:
    """Give one layer's statistics to every open collector; padding and examples of it alone are left out."""
    dispatch, combine = dispatch.flatten(2), combine.flatten(2)
    # Products with 0 and 1 instead of indexing: shapes that depend on the data would break a compiled graph.
    real = dispatch.new_ones(dispatch.shape[:2]) if mask is None else mask.to(dispatch.dtype)
    lengths = real.sum(1)
    examples = (lengths > 0) / (lengths > 0).sum().clamp(min=1)
    tokens = real / lengths.sum().clamp(min=1)
    # A lone token, or a lone slot, has nothing to choose between: its entropy is 0, not 0 / 0.
    dispatch_entropy = torch.special.entr(dispatch).sum(1).mean(1) / lengths.log().clamp(min=1e-30)
    combine_entropy = torch.special.entr(combine).sum(2) / max(log(combine.shape[2]), 1e-30)
    statistics = {
        "dispatch_entropy": (dispatch_entropy * examples).sum(),
        "combine_entropy": (combine_entropy * tokens).sum(),
        "dispatch_max": (dispatch.amax(1).mean(1) * examples).sum(),
        "combine_max": (combine.amax(2) * tokens).sum(),
        "router_scale": router_scale.detach().clone(),
    }
    for collected in _open:
        collected.reports.setdefault(label, []).append({name: value.float() for name, value in statistics.items()})
