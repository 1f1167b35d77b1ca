"""Search by the clock: cut, time, and aim lower or higher until the budget is met, and used, as measured.

A table's prediction is off by a few per cent, and by more where a runtime has its likes; where the device is at hand,
the structure itself can be timed before any effort is spent on recovering it. Where it takes too long, the next plan
is a smaller one; where it leaves much of the budget unused, channels can come back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import InfeasibleBudget
from ..plan import PruningPlan

_ATTEMPTS = 4
#: Share of the budget from which on it counts as used.
_USED = 0.95
#: What is aimed at, as a share of the budget: a clock that is read again differs, and a plan that is in time already is
#: not widened to the very limit.
_TIGHTER, _WIDER = 0.99, 0.97


def search_by_clock(
    first: PruningPlan,
    search: Callable[[float], PruningPlan],
    milliseconds: Callable[[PruningPlan], float],
    limit_ms: float,
    log: Callable[[str], None] = lambda _: None,
) -> PruningPlan:
    """The widest plan of four at most whose network runs within `limit_ms` as timed; the last one if none does.

    Args:
        first: the plan to begin with.
        search: the plan for a predicted latency in ms.
        milliseconds: times a plan's network.
        limit_ms: what the clock must show at most.

    Raises:
        InfeasibleBudget: no plan has been in time, and there is none for what the clock asks.
    """
    plan, within, over_ms = first, None, math.inf
    for attempt in range(1, _ATTEMPTS + 1):
        predicted, measured = _predicted(plan), milliseconds(plan)
        log(f"latency predicted {predicted:.4g} ms, measured {measured:.4g} ms")
        if measured > limit_ms:
            over_ms, aim = min(over_ms, predicted), _TIGHTER
        else:
            within, aim = plan, _WIDER
        if _USED * limit_ms <= measured <= limit_ms or attempt == _ATTEMPTS:
            break
        try:
            other = search(_next_aim(predicted * aim * limit_ms / measured, within, over_ms))
        except InfeasibleBudget as error:
            if within is not None:
                break
            raise InfeasibleBudget(f"expected a structure that runs in {limit_ms:.4g} ms, the last one within reach "
                                   f"took {measured:.4g} ms; {error}") from error  # fmt: skip
        if within is not None and _predicted(other) <= _predicted(within):
            break
        plan = other
    return plan if within is None else within


def _predicted(plan: PruningPlan) -> float:
    return plan.costs["latency_ms"].predicted


def _next_aim(proposed_ms: float, within: PruningPlan | None, over_ms: float) -> float:
    """What the clock proposes, or halfway between what was in time and what was over if it lies outside."""
    if within is None or _predicted(within) < proposed_ms < over_ms:
        return proposed_ms
    return (_predicted(within) + over_ms) / 2
