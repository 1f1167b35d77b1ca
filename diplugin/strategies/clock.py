"""Search by the clock: predict, cut, time, and aim lower or higher until the budget is met, and used, as measured.

A table's prediction is off by a few per cent, and by more where a runtime has its likes; where the device is at hand,
the structure itself can be timed before any effort is spent on recovering it. Where it takes too long, the next plan
is a smaller one; where it leaves much of the budget unused, channels can come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..plan import PruningPlan

_ATTEMPTS = 4
_TO_SPARE = 0.99
#: Share of the budget from which on it counts as used: what is nearer is left to the clock's own noise.
_USED = 0.95


def search_by_clock(
    search: Callable[[float], PruningPlan],
    milliseconds: Callable[[PruningPlan], float],
    limit_ms: float,
    aim_ms: float,
    log: Callable[[str], None] = lambda _: None,
) -> PruningPlan:
    """The widest plan of four at most whose network runs within `limit_ms` as timed; the last one if none does.

    Args:
        search: the plan for a predicted latency in ms.
        milliseconds: times a plan's network.
        limit_ms: what the clock must show at most.
        aim_ms: predicted latency to begin with.

    Raises:
        InfeasibleBudget: no plan has been in time, and `search` has none for what the clock asks.
    """
    within: PruningPlan | None = None
    over_ms = math.inf
    for _ in range(_ATTEMPTS):
        plan = search(aim_ms)
        predicted = plan.costs["latency_ms"].predicted
        if within is not None and predicted <= within.costs["latency_ms"].predicted:
            break
        measured = milliseconds(plan)
        log(f"latency predicted {predicted:.4g} ms, measured {measured:.4g} ms")
        if measured > limit_ms:
            over_ms = min(over_ms, predicted)
        else:
            within = plan
            if measured >= _USED * limit_ms:
                break
        aim_ms = _next_aim(predicted * _TO_SPARE * limit_ms / measured, within, over_ms)
    return plan if within is None else within


def _next_aim(proposed_ms: float, within: PruningPlan | None, over_ms: float) -> float:
    """What the clock proposes, or halfway between what was in time and what was over if it lies outside."""
    if within is None:
        return proposed_ms
    within_ms = within.costs["latency_ms"].predicted
    return proposed_ms if within_ms < proposed_ms < over_ms else (within_ms + over_ms) / 2
