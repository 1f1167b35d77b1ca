"""Search by the clock against imaginary devices whose clocks and tables disagree."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diplugin.errors import InfeasibleBudget
from diplugin.plan import PlannedCost, PruningPlan
from diplugin.strategies import search_by_clock

CHANNELS = 100
PREDICTED = 10.0


class Device:
    """A layer of 100 channels that a table predicts in proportion, and a clock of its own; remembers all plans."""

    def __init__(self, clock: Callable[[float], float]) -> None:
        self.clock = clock
        self.asked: list[float] = []
        self.timed: list[float] = []

    def search(self, aim_ms: float) -> PruningPlan:
        self.asked.append(aim_ms)
        width = min(CHANNELS, math.floor(CHANNELS * aim_ms / PREDICTED))
        if not width:
            raise InfeasibleBudget("expected a latency within reach")
        cost = PlannedCost(PREDICTED, PREDICTED * width / CHANNELS)
        return PruningPlan({"a": tuple(range(width))}, {"a": CHANNELS}, {"latency_ms": cost})

    def milliseconds(self, plan: PruningPlan) -> float:
        self.timed.append(plan.costs["latency_ms"].predicted)
        return self.clock(self.timed[-1])

    def plan(self, limit_ms: float, aim_ms: float) -> float:
        """What is predicted of the plan that is found."""
        found = search_by_clock(self.search(aim_ms), self.search, self.milliseconds, limit_ms)
        return found.costs["latency_ms"].predicted


def test_a_true_table_is_asked_once() -> None:
    device = Device(lambda predicted: predicted)
    assert device.plan(5.0, 4.9) == 4.9 and device.asked == [4.9]


def test_an_optimistic_table_is_corrected() -> None:
    device, lines = Device(lambda predicted: 1.3 * predicted), list[str]()
    plan = search_by_clock(device.search(5.0), device.search, device.milliseconds, 5.0, lines.append)
    assert device.clock(plan.costs["latency_ms"].predicted) <= 5.0
    assert len(device.asked) == 2 and len(lines) == 2


def test_a_pessimistic_table_gives_channels_back() -> None:
    device = Device(lambda predicted: 0.8 * predicted)
    assert 4.75 <= device.clock(device.plan(5.0, 5.0)) <= 5.0
    assert len(device.asked) == 2


def test_a_wider_plan_that_is_over_is_not_taken() -> None:
    """The clock leaps where the table sees a slope: below the leap nothing uses the budget, above it nothing fits."""
    device = Device(lambda predicted: 2.0 if predicted <= 5.0 else 9.0)
    assert device.plan(6.0, 5.0) == 5.0
    assert len(device.timed) == 4 and min(device.timed[1:]) > 5.0


def test_where_nothing_wider_is_left_it_ends() -> None:
    device = Device(lambda predicted: 0.1 * predicted)
    assert device.plan(9.0, PREDICTED) == PREDICTED
    assert len(device.asked) == 2 and len(device.timed) == 1


def test_a_clock_that_never_agrees_ends() -> None:
    device = Device(lambda _: 7.0)
    device.plan(5.0, 5.0)
    assert len(device.asked) == 4 and device.asked == sorted(device.asked, reverse=True)


def test_what_cannot_be_met_is_said_in_the_numbers_asked_for() -> None:
    with pytest.raises(InfeasibleBudget, match="runs in 5 ms, the last one within reach took 999 ms"):
        Device(lambda _: 999.0).plan(5.0, 5.0)


def test_a_wider_plan_that_cannot_be_found_loses_nothing() -> None:
    """Two budgets together may be out of a greedy search's reach where the tighter ones were within it."""
    device = Device(lambda predicted: 0.5 * predicted)

    def search(aim_ms: float) -> PruningPlan:
        if aim_ms > 5.0:
            raise InfeasibleBudget("expected a latency within reach")
        return device.search(aim_ms)

    first = search(5.0)
    assert search_by_clock(first, search, device.milliseconds, 5.0) is first


@given(st.lists(st.floats(0.5, 3.0), min_size=CHANNELS, max_size=CHANNELS), st.floats(1.0, 9.0))
def test_of_all_that_was_timed_the_widest_in_time_is_taken(errors: list[float], limit: float) -> None:
    """However the clock leaps, against a look at everything that it showed."""
    device = Device(lambda predicted: predicted * errors[round(CHANNELS * predicted / PREDICTED) - 1])
    found = device.plan(limit, limit)
    in_time = [predicted for predicted in device.timed if device.clock(predicted) <= limit]
    assert found == (max(in_time) if in_time else device.timed[-1])
    assert len(device.asked) <= 4
