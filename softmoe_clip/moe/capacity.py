"""How many tokens an expert may take: the one place where a capacity factor becomes a number of slots."""

from math import ceil
from typing import Literal

Rounding = Literal["ceil", "round"]


def slots_per_group(num_choices: int, num_experts: int, factor: float, rounding: Rounding, multiple_of: int) -> int:
    """Return the slots each expert gets in a routing group whose tokens make `num_choices` choices, as vmoe counts.

    `round` takes halves to the even number; the result is raised to a multiple of `multiple_of`. Raises ValueError
    where that would leave an expert without any slot.
    """
    exact = num_choices * factor / num_experts
    slots = ceil(exact) if rounding == "ceil" else round(exact)
    if slots < 1:
        raise ValueError(
            f"capacity_factor {factor} gives {num_experts} experts less than one token each of {num_choices}: "
            "raise capacity_factor, set capacity_rounding to ceil, or take fewer experts"
        )
    return slots + -slots % multiple_of
