"""What greedy search undoes once all budgets hold, against brute force over every pair of groups."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_searches import chain, loss_of, made_up, problems, search, staircase
from torch import Tensor

from diplugin.costs import Budget, SeparableCost, Term
from diplugin.errors import InfeasibleBudget
from diplugin.network import NetworkTrace


def test_one_group_pays_for_another() -> None:
    """The best ratio comes first and frees more than was asked; a group that loses less frees enough."""
    trace, _ = made_up([(2, 1), (2, 1), (2, 1)], 0)
    scores = {"g0": torch.tensor([1.0, 9.0]), "g1": torch.tensor([0.7, 9.0]), "g2": torch.tensor([0.6, 9.0])}
    weights = {"g0": 10.0, "g1": 4.0, "g2": 4.0}
    cost = SeparableCost("macs", "", trace.base_widths, [Term((n,), lambda w, n=n: weights[n] * w[n]) for n in weights])
    plan = search(trace, {n: s.double() for n, s in scores.items()}, [cost], [Budget("macs", limit=cost.base - 4)])
    assert plan.widths == {"g0": 2, "g1": 2, "g2": 1}
    assert plan.path[-1].loss == pytest.approx(0.6)


@settings(max_examples=60)
@given(problem=problems, fraction=st.floats(0.2, 1.0), step=st.integers(1, 5), bump=st.floats(0.0, 3.0))
def test_no_pair_of_groups_is_left_whose_exchange_is_worth_while(
    problem: tuple[NetworkTrace, dict[str, Tensor]], fraction: float, step: int, bump: float
) -> None:
    trace, scores = problem
    costs = [chain(trace), staircase(trace, step, bump)]
    budgets = [Budget(cost.name, fraction=fraction) for cost in costs]
    try:
        plan = search(trace, scores, costs, budgets)
    except InfeasibleBudget:
        return
    assert all(cost.cost(plan.widths) <= fraction * cost.base * (1 + 1e-12) for cost in costs)
    lost = loss_of(trace, scores, plan.widths)
    assert plan.path[-1].loss == pytest.approx(lost, abs=1e-9)
    for one, other in itertools.permutations(trace.prunable, 2):
        for wider in range(plan.widths[one.name] + one.blocks, one.channels + 1, one.blocks):
            for narrower in range(other.blocks, plan.widths[other.name], other.blocks):
                widths = {**plan.widths, one.name: wider, other.name: narrower}
                if all(cost.cost(widths) <= fraction * cost.base * (1 - 1e-12) for cost in costs):
                    assert loss_of(trace, scores, widths) >= 0.99 * lost - 1e-9
