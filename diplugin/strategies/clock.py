"""Search by the clock: predict, cut, time, and aim lower until the budget holds as measured.

A table's prediction is off by a few per cent; where the device is at hand, the structure itself can be timed before
any effort is spent on recovering it.
"""

from __future__ import annotations

from collections.abc import Callable

from ..plan import PruningPlan

_ATTEMPTS = 4
_TO_SPARE = 0.99


def search_by_clock(
    search: Callable[[float], PruningPlan],
    milliseconds: Callable[[PruningPlan], float],
    limit_ms: float,
    aim_ms: float,
    log: Callable[[str], None] = lambda _: None,
) -> PruningPlan:
    """A plan whose network runs within `limit_ms` as timed, or the last of four attempts.

    Args:
        search: the plan for a predicted latency in ms.
        milliseconds: times a plan's network.
        limit_ms: what the clock must show at most.
        aim_ms: predicted latency to begin with.
    """
    plan = search(aim_ms)
    for _ in range(_ATTEMPTS - 1):
        measured = milliseconds(plan)
        log(f"latency predicted {plan.costs['latency_ms'].predicted:.4g} ms, measured {measured:.4g} ms")
        if measured <= limit_ms:
            break
        aim_ms = min(aim_ms, plan.costs["latency_ms"].predicted) * _TO_SPARE * limit_ms / measured
        plan = search(aim_ms)
    return plan
