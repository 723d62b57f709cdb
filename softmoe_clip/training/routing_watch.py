"""Say in one line when the routing of a layer collapses, and when it comes back: once per change, not per step."""

import math
from collections.abc import Callable, Iterable
from math import prod
from typing import NamedTuple

from torch import nn

from softmoe_clip.moe.assignment import BaseMoE, SinkhornMoE
from softmoe_clip.moe.experts_choice import ExpertsChoiceMoE
from softmoe_clip.moe.soft import SoftMoE
from softmoe_clip.moe.tokens_choice import TokensChoiceMoE


class Sign(NamedTuple):
    """One way in which routing fails: `room` is how far a statistic is from its worst value, 0 is the end.

    It shows below `low`, and is over once there is a fifth more. `once` is set where a fresh layer may stand there too:
    then only a layer that has had so much room can have lost it.
    """

    statistic: str
    what: str
    room: Callable[[float], float]
    low: float
    once: float = 0.0


def below_one(value: float) -> float:
    """The room of a statistic that is 1 at its worst."""
    return 1 - value


SIGNS = (
    Sign("dispatch_max", "each slot takes a single token", below_one, 0.05),
    Sign("combine_entropy", "each token listens to a single slot", lambda entropy: entropy, 0.05),
    # The reference starts with slots that are nearly equal (1e-5 to 1e-3 from it, and swinging, in the demo's towers).
    Sign("slot_similarity", "all slots take in the same", below_one, 1e-3, once=0.02),
    Sign("dead_experts", "most experts are dead", below_one, 0.5),
    # A capacity factor of 1/4 drops three quarters by itself.
    Sign("dropped", "most tokens find no expert", below_one, 0.5, once=0.6),
)
ENDED = 1.2
# The others are controls, some of which stand at such an end by design.
WATCHED = (SoftMoE, TokensChoiceMoE, ExpertsChoiceMoE, SinkhornMoE, BaseMoE)


def watched_layers(model: nn.Module) -> set[str]:
    """Return the labels of the layers whose router learns, and has more than one slot or expert to choose from."""
    layers = [module for module in model.modules() if type(module) in WATCHED]
    return {layer.label for layer in layers if (prod(layer.slots) if type(layer) is SoftMoE else layer.num_experts) > 1}


class RoutingWatch:
    """Look at what the layers with these labels report, from the end of the warmup on.

    `lines` are those of metrics.jsonl when a run goes on: what was said before is not said again.
    """

    def __init__(self, layers: set[str], warmup: int, lines: Iterable[dict] = ()):
        self.layers = layers
        self.warmup = warmup
        self.best: dict[str, float] = {}
        self.shown: dict[str, bool] = {}
        for line in lines:
            self.changes(line["step"], line)

    def changes(self, step: int, numbers: dict[str, int | float]) -> list[str]:
        """Take what a step logs (`routing/<layer>/<statistic>`) and return a line for each layer that changed."""
        said = []
        for layer in sorted(self.layers):
            begun, ended = [], []
            for sign in SIGNS:
                name = f"routing/{layer}/{sign.statistic}"
                if (
                    numbers.get(name) is not None
                    and (change := self.change(name, sign, numbers[name], step)) is not None
                ):
                    (begun if change else ended).append(f"{sign.what} ({sign.statistic} {numbers[name]:.4g})")
            said += [f"step {step}: the routing of {layer} has collapsed: {', '.join(begun)}"] if begun else []
            said += [f"step {step}: the routing of {layer} is back: no longer {', '.join(ended)}"] if ended else []
        return said

    def change(self, name: str, sign: Sign, value: float, step: int) -> bool | None:
        """Return True when a sign begins to show, False when it ends, None while all stays as it was."""
        if math.isnan(value):
            return None
        room, shown = sign.room(value), self.shown.get(name, False)
        self.best[name] = best = max(room, self.best.get(name, 0.0))
        changes = room > ENDED * sign.low if shown else room < sign.low and best >= sign.once
        if step <= self.warmup or not changes:
            return None
        self.shown[name] = not shown
        return not shown
