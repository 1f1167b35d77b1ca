"""Widths that greedy search may give a group: whole blocks, floors, alignment, a cost's grid, steps of wide groups.

No network here: groups with made-up costs and losses.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from made_up_searches import chain, group, search, trace_of

from diplugin.costs import Budget, SeparableCost, Term
from diplugin.errors import BudgetError, InfeasibleBudget
from diplugin.search import SearchLimits, allowed_widths


def test_blocks_leave_as_whole_units() -> None:
    trace = trace_of(group("a", 12, blocks=3))
    scores = {"a": torch.arange(12, dtype=torch.float64)}
    plan = search(trace, scores, [chain(trace)], [Budget("macs", fraction=0.5)])
    assert plan.kept == {"a": (2, 3, 6, 7, 10, 11)}


def test_floor_and_alignment() -> None:
    trace = trace_of(group("a", 32), group("b", 32), group("odd", 6))
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.channels, generator=generator).double() for g in trace.prunable}
    limits = SearchLimits(floor=0.25, align=8)
    plan = search(trace, scores, [chain(trace)], [Budget("macs", fraction=0.3)], limits)
    assert all(plan.widths[n] % 8 == 0 and plan.widths[n] >= 8 for n in ("a", "b"))
    assert plan.widths["odd"] == 6, "no multiple of 8 fits below, so it stays whole"


def test_alignment_keeps_blocks_whole() -> None:
    trace = trace_of(group("a", 24, blocks=3))
    scores = {"a": torch.rand(24).double()}
    plan = search(trace, scores, [chain(trace)], [Budget("macs", fraction=0.7)], SearchLimits(floor=0.0, align=4))
    assert plan.widths["a"] == 12


def test_floor_of_one_leaves_everything() -> None:
    trace = trace_of(group("a", 8))
    with pytest.raises(InfeasibleBudget):
        search(
            trace,
            {"a": torch.ones(8).double()},
            [chain(trace)],
            [Budget("macs", fraction=0.9)],
            SearchLimits(floor=1.0),
        )


class OnGrid(SeparableCost):
    """A cost that was profiled at some widths only."""

    grid: Mapping[str, tuple[int, ...]]

    def allowed_widths(self, name: str) -> tuple[int, ...] | None:
        return self.grid.get(name)


def test_a_cost_model_names_the_widths_it_knows() -> None:
    trace = trace_of(group("a", 16), group("b", 16))
    scores = {n: torch.rand(16).double() for n in ("a", "b")}
    cost = OnGrid("macs", "", trace.base_widths, [Term((n,), lambda w, n=n: float(w[n])) for n in ("a", "b")])
    cost.grid = {"a": (5, 11, 16)}
    for fraction in (0.9, 0.7, 0.5, 0.3):
        plan = search(trace, scores, [cost], [Budget("macs", fraction=fraction)])
        assert plan.widths["a"] in (5, 11, 16)
        assert plan.costs["macs"].predicted <= fraction * 32


def test_wide_groups_are_searched_in_steps() -> None:
    """2,048 channels leave 16 at a time from the top to the floor, 1,000 leave 7 at a time, and the budget is met."""
    trace = trace_of(group("a", 2048), group("b", 1000))
    scores = {g.name: torch.rand(g.channels).double() for g in trace.prunable}
    cost, limits = chain(trace), SearchLimits(floor=0.1)
    for name, step in (("a", 16), ("b", 7)):
        channels = trace.by_name[name].channels
        steps = [channels - step * i for i in range(channels) if channels - step * i >= 0.1 * channels]
        assert allowed_widths(trace.by_name[name], [cost], limits) == steps[::-1]
    plan = search(trace, scores, [cost], [Budget("macs", fraction=0.37)], limits)
    assert plan.costs["macs"].predicted == cost.cost(plan.widths) <= 0.37 * cost.base
    assert (2048 - plan.widths["a"]) % 16 == 0 == (1000 - plan.widths["b"]) % 7
    for name, step in (("a", 16), ("b", 7)):
        assert cost.cost({**plan.widths, name: plan.widths[name] + step}) > 0.37 * cost.base


@pytest.mark.parametrize("bad", [{"floor": -0.1}, {"floor": 1.1}, {"align": 0}, {"rescore_every": 2.0}])
def test_limits_that_mean_nothing(bad: dict[str, float]) -> None:
    with pytest.raises(BudgetError):
        SearchLimits(**bad)  # type: ignore[arg-type]
