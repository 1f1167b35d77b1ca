"""Budgets that pull against each other: what greedy search finds where narrower groups alone free nothing any more.

The structure that is known to meet the budgets is planted: the limits are what it costs.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_up_searches import chain, group, made_up, problems, search, staircase, trace_of
from torch import Tensor

from diplugin.costs import Budget, SeparableCost, Term, Widths
from diplugin.errors import InfeasibleBudget, TableError
from diplugin.network import NetworkTrace


@settings(max_examples=60)
@given(problem=problems, seed=st.integers(0, 2**16), step=st.integers(2, 5), bump=st.floats(0.0, 3.0))
@example(problem=made_up([(5, 1), (8, 2)], 0), seed=6, step=4, bump=2.0)
@example(problem=made_up([(6, 3), (8, 2)], 0), seed=150, step=3, bump=2.0)
@example(problem=made_up([(2, 1), (5, 1)], 0), seed=7626, step=3, bump=1e-12)
def test_a_structure_that_meets_two_budgets_is_not_missed(
    problem: tuple[NetworkTrace, dict[str, Tensor]], seed: int, step: int, bump: float
) -> None:
    trace, scores = problem
    generator = torch.Generator().manual_seed(seed)
    planted = {g.name: g.blocks * int(torch.randint(1, g.units + 1, (), generator=generator)) for g in trace.prunable}
    costs = [chain(trace), staircase(trace, step, bump)]
    limits = [cost.cost(planted) for cost in costs]
    plan = search(trace, scores, costs, [Budget(c.name, limit=limit) for c, limit in zip(costs, limits, strict=True)])
    assert all(cost.cost(plan.widths) <= limit for cost, limit in zip(costs, limits, strict=True))


class Gaps:
    """Milliseconds of two groups in one table, which does not hold some widths of "a" once "b" has one channel."""

    a, b = {5: 10.0, 4: 9.9, 3: 9.8, 2: 9.7, 1: 1.0}, {5: 5.0, 4: 4.0, 3: 3.0, 2: 2.0, 1: 1.0}

    def __init__(self) -> None:
        self.missed = 0

    def __call__(self, widths: Widths) -> float:
        if widths["b"] == 1 and 1 < widths["a"] < 5:
            self.missed += 1
            raise TableError("no entry")
        return self.a[widths["a"]] + self.b[widths["b"]]


def test_a_width_that_the_table_lacks_is_no_reason_to_stop() -> None:
    trace, gaps = trace_of(group("a", 5), group("b", 5)), Gaps()
    scores = {"a": torch.full((5,), 0.1).double(), "b": torch.ones(5).double()}
    cost = SeparableCost("latency_ms", "ms", trace.base_widths, [Term(("a", "b"), gaps)])
    with pytest.raises(InfeasibleBudget, match="latency_ms 2 "):
        search(trace, scores, [cost], [Budget("latency_ms", limit=1.5)])
    assert gaps.missed, "the search asked for one"
