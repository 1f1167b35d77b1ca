"""Schedules: budgets on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diplugin.errors import BudgetError
from diplugin.strategies import Geometric, Linear


@pytest.mark.parametrize("schedule", [Linear(1), Linear(5), Geometric(1), Geometric(5)])
def test_schedules_fall_from_the_unpruned_cost_to_the_budget(schedule: Any) -> None:
    limits = [100.0, *(schedule.limit(100.0, 30.0, step) for step in range(1, schedule.steps + 1))]
    assert limits[-1] == 30.0 and limits == sorted(limits, reverse=True) and len(set(limits)) == len(limits)
    drops = np.diff(limits if isinstance(schedule, Linear) else np.log(limits))
    assert np.allclose(drops, drops[0])
    assert schedule.limit(20.0, 30.0, 1) == 30.0, "a budget that holds already asks for nothing"


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_a_schedule_has_steps(steps: Any) -> None:
    for kind in (Linear, Geometric):
        with pytest.raises(BudgetError, match="1 step or more"):
            kind(steps)
