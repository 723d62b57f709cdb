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


# A graph break under torch.compile, met only while a collector is open; no_grad saves nothing for backward, so that
# gradient checkpointing sees the same graph with and without a collector.
@torch.compiler.disable
@torch.no_grad()
def report(
    label: str,
    dispatch: Float[Tensor, "b n e s"],
    combine: Float[Tensor, "b n e s"],
    router_scale: Float[Tensor, ""],
    mask: Bool[Tensor, "b n"] | None,
) -> None:
    """Give one layer's statistics to every open collector; padding is left out of the means."""
    dispatch, combine = dispatch.detach().flatten(2), combine.detach().flatten(2)
    if mask is None:
        mask = torch.ones(dispatch.shape[:2], dtype=torch.bool, device=dispatch.device)
    some = mask.any(1)
    dispatch, combine = dispatch[some], combine[mask]
    # A lone token has nothing to choose between: its entropy is 0, not 0 / 0.
    most = mask[some].sum(1, keepdim=True).log().clamp(min=torch.finfo(torch.float32).tiny)
    statistics = {
        "dispatch_entropy": (torch.special.entr(dispatch).sum(1) / most).mean(),
        "combine_entropy": torch.special.entr(combine).sum(-1).mean() / max(log(combine.shape[-1]), 1e-30),
        "dispatch_max": dispatch.amax(1).mean(),
        "combine_max": combine.amax(-1).mean(),
        "router_scale": router_scale.detach().clone(),
    }
    for collected in _open:
        collected.reports.setdefault(label, []).append({name: v.float() for name, v in statistics.items()})
