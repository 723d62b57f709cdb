"""Say in one line when the routing of a layer collapses, and when it comes back: once per change, not per step."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from softmoe_clip.config import ModelConfig


class Sign(NamedTuple):
    """One way in which routing fails: `room` is how far a statistic is from its worst value, 0 is the end.

    It shows below `low`, and is over once there is a fifth more. `of_best` is set where a fresh layer may stand there
    too: then it shows only below this part of the most room there ever was, so that something must have got worse.
    """

    statistic: str
    what: str
    room: Callable[[float], float]
    low: float
    of_best: float | None = None


def below_one(value: float) -> float:
    """The room of a statistic that is 1 at its worst."""
    return 1 - value


SIGNS = (
    Sign("dispatch_max", "each slot takes a single token", below_one, 0.05),
    Sign("combine_entropy", "each token listens to a single slot", lambda entropy: entropy, 0.05),
    # The reference starts with slots that are nearly equal: only what falls far behind that is a collapse.
    Sign("slot_similarity", "all slots take in the same", below_one, 1e-3, of_best=0.1),
    Sign("dead_experts", "most experts are dead", below_one, 0.5),
    # A capacity factor of 1/4 drops three quarters by itself.
    Sign("dropped", "most tokens find no expert", below_one, 0.5, of_best=0.7),
)
ENDED = 1.2
# The others are controls, some of which stand at such an end by design.
WATCHED_ROUTERS = ("soft", "tokens_choice", "experts_choice", "sinkhorn", "base")


class RoutingWatch:
    """Look at what the layers report, from the end of the warmup on.

    `lines` are those of metrics.jsonl when a run goes on: what was said before is not said again.
    """

    def __init__(self, model: ModelConfig, warmup: int, lines: Iterable[dict] = ()):
        towers = {"image": model.image_moe, "text": model.text_moe}
        self.towers = {
            tower
            for tower, moe in towers.items()
            # A lone slot takes everything, and every token listens to it.
            if moe and moe.router in WATCHED_ROUTERS and moe.num_experts * moe.slots_per_expert > 1
        }
        self.warmup = warmup
        self.best: dict[str, float] = {}
        self.shown: dict[str, bool] = {}
        for line in lines:
            self.changes(line["step"], line)

    def changes(self, step: int, numbers: dict[str, int | float]) -> list[str]:
        """Take what a step logs (`routing/<layer>/<statistic>`) and return a line for each layer that changed."""
        said = []
        for layer in dict.fromkeys(name.rpartition("/")[0] for name in numbers if name.startswith("routing/")):
            if layer.split("/")[1] not in self.towers:
                continue
            begun, ended = [], []
            for sign in SIGNS:
                name = f"{layer}/{sign.statistic}"
                if name in numbers and (change := self.change(name, sign, numbers[name], step)) is not None:
                    (begun if change else ended).append(f"{sign.what} ({sign.statistic} {numbers[name]:.4g})")
            place = layer.removeprefix("routing/")
            said += [f"step {step}: the routing of {place} has collapsed: {', '.join(begun)}"] if begun else []
            said += [f"step {step}: the routing of {place} is back: no longer {', '.join(ended)}"] if ended else []
        return said

    def change(self, name: str, sign: Sign, value: float, step: int) -> bool | None:
        """Return True when a sign begins to show, False when it ends, None while all stays as it was."""
        if math.isnan(value):
            return None
        room, low, shown = max(0.0, sign.room(value)), sign.low, self.shown.get(name, False)
        if sign.of_best is not None:
            self.best[name] = max(room, self.best.get(name, 0.0))
            low = min(low, sign.of_best * self.best[name])
        if step <= self.warmup or not (room > ENDED * low if shown else room < low):
            return None
        self.shown[name] = not shown
        return not shown
