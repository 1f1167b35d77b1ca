"""Search by the clock against an imaginary device whose clock and table disagree."""

from __future__ import annotations

from diplugin.plan import PlannedCost, PruningPlan
from diplugin.strategies import search_by_clock


class Device:
    """Runs everything `error` times as long as its table says; remembers what it was asked."""

    def __init__(self, error: float) -> None:
        self.error = error
        self.asked: list[float] = []

    def search(self, aim_ms: float) -> PruningPlan:
        self.asked.append(aim_ms)
        return PruningPlan({"a": (0,)}, {"a": 2}, {"latency_ms": PlannedCost(10.0, aim_ms)})

    def milliseconds(self, plan: PruningPlan) -> float:
        return plan.costs["latency_ms"].predicted * self.error


def test_a_true_table_is_asked_once() -> None:
    device = Device(1.0)
    plan = search_by_clock(device.search, device.milliseconds, 5.0, 4.9)
    assert device.asked == [4.9] and plan.costs["latency_ms"].predicted == 4.9


def test_an_optimistic_table_is_corrected() -> None:
    device, lines = Device(1.3), list[str]()
    plan = search_by_clock(device.search, device.milliseconds, 5.0, 5.0, lines.append)
    assert device.milliseconds(plan) <= 5.0
    assert len(device.asked) == 2 and len(lines) == 2


def test_a_clock_that_never_agrees_ends() -> None:
    device = Device(1.0)
    search_by_clock(device.search, lambda _: 99.0, 5.0, 5.0)
    assert len(device.asked) == 4 and device.asked == sorted(device.asked, reverse=True)
