"""Widths in proportion: as wide as a walk over the factor finds them, and plans that keep the largest losses."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diplugin.costs import Budget, macs, params
from diplugin.errors import BudgetError, InfeasibleBudget
from diplugin.network import trace_network
from diplugin.search import SearchLimits, allowed_widths, plan_at, widest
from diplugin.surgery import apply_plan

INPUTS = (torch.zeros(1, 3, 8, 8),)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 4),
    )  # fmt: skip


TRACE = trace_network(net(), INPUTS)
COSTS = [macs(TRACE), params(TRACE)]
NAMES = [g.name for g in TRACE.prunable]
LOSSES = {g.name: torch.rand(g.channels, generator=torch.Generator().manual_seed(1)) for g in TRACE.prunable}


def fit(widths: Mapping[str, int], budgets: list[Budget]) -> bool:
    models = {model.name: model for model in COSTS}
    return all(models[b.cost].cost(widths) <= b.absolute(models[b.cost]) for b in budgets)


def walk(profile: Mapping[str, float], budgets: list[Budget], limits: SearchLimits) -> dict[str, int]:
    """The widths of the first factor that fits, coming down in small steps."""
    grids = {g.name: allowed_widths(g, COSTS, limits) for g in TRACE.prunable}
    top = max(grid[-1] / profile[name] for name, grid in grids.items())
    for factor in np.linspace(top, 0, 5001):
        widths = {n: min(grid, key=lambda w: abs(w - factor * profile[n])) for n, grid in grids.items()}
        if fit(widths, budgets):
            return widths
    raise AssertionError("out of reach")


@given(st.lists(st.floats(0.5, 20), min_size=3, max_size=3), st.floats(0.25, 0.95), st.floats(0.25, 0.95),
       st.sampled_from([1, 4]))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_as_wide_as_the_budgets_allow(shape: list[float], macs_share: float, params_share: float, align: int) -> None:
    profile, limits = dict(zip(NAMES, shape, strict=True)), SearchLimits(floor=0.1, align=align)
    budgets = [Budget("macs", fraction=macs_share), Budget("params", fraction=params_share)]
    widths = widest(TRACE, COSTS, budgets, limits, profile)
    assert fit(widths, budgets)
    assert all(widths[name] >= width for name, width in walk(profile, budgets, limits).items())
    grids = {g.name: allowed_widths(g, COSTS, limits) for g in TRACE.prunable}
    assert all(width in grids[name] for name, width in widths.items())
    wider = {name: min([w for w in grids[name] if w > width], default=width) for name, width in widths.items()}
    assert wider == widths or not fit(wider, budgets)


def test_what_rounding_leaves_over_goes_to_who_was_cut_shortest() -> None:
    budgets = [Budget("macs", fraction=0.5)]
    profile = dict.fromkeys(NAMES, 10.0)
    widths, plain = widest(TRACE, COSTS, budgets, SearchLimits(), profile), walk(profile, budgets, SearchLimits())
    assert sum(widths.values()) > sum(plain.values())
    assert max(widths[n] - plain[n] for n in NAMES) <= max(g.blocks for g in TRACE.prunable)


def test_a_budget_that_holds_unpruned_cuts_nothing_and_one_out_of_reach_says_so() -> None:
    profile = dict.fromkeys(NAMES, 1.0)
    assert widest(TRACE, COSTS, [Budget("macs", fraction=1.0)], SearchLimits(), profile) == TRACE.base_widths
    with pytest.raises(InfeasibleBudget, match=r"meet macs <= 0\.001 .* not even the narrowest"):
        widest(TRACE, COSTS, [Budget("macs", fraction=0.001)], SearchLimits(), profile)
    with pytest.raises(BudgetError, match="on latency_ms"):
        widest(TRACE, COSTS, [Budget("latency_ms", fraction=0.5)], SearchLimits(), profile)


def test_the_plan_of_given_widths_keeps_the_largest_losses_and_costs_what_the_cut_network_does() -> None:
    widths = {NAMES[0]: 5, NAMES[1]: 8, NAMES[2]: 12}
    widths = {g.name: widths[g.name] - widths[g.name] % g.blocks for g in TRACE.prunable}
    plan = plan_at(TRACE, LOSSES, COSTS, widths)
    small = trace_network(apply_plan(net(), plan), INPUTS)
    assert plan.widths == widths
    assert [plan.costs[m.name].predicted for m in COSTS] == [macs(small).base, params(small).base]
    for group in TRACE.prunable:
        units = LOSSES[group.name].view(group.blocks, -1).sum(0)
        stay = {c % group.units for c in plan.kept[group.name]}
        gone = set(range(group.units)) - stay
        assert min(units[list(stay)]) >= max(units[list(gone)], default=0)
        assert plan.kept[group.name] == tuple(u + b * group.units for b in range(group.blocks) for u in sorted(stay))
