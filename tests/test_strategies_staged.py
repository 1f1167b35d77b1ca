"""Staged cuts meet the budget whatever their numbers, in the proportions asked for, and keep what DI ranks first."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diplugin.costs import Budget, macs, params
from diplugin.errors import BudgetError, InfeasibleBudget
from diplugin.network import NetworkTrace, trace_network
from diplugin.strategies.staged import StagedCut, staged_plan, stages_of
from diplugin.surgery import apply_plan


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=4), nn.ReLU(), nn.Conv2d(24, 20, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 4),
    )  # fmt: skip


INPUTS = (torch.zeros(1, 3, 8, 8),)
TRACE = trace_network(net(), INPUTS)
SCORES = {g.name: torch.rand(g.channels, generator=torch.Generator().manual_seed(1)) for g in TRACE.prunable}
COSTS = [macs(TRACE), params(TRACE)]


def plan(cut: StagedCut, fraction: float = 0.5, trace: NetworkTrace = TRACE, **more: Any) -> Any:
    return staged_plan(trace, SCORES, COSTS, Budget("macs", fraction=fraction), cut, **more)


def test_stages_are_resolutions() -> None:
    assert stages_of(TRACE) == (("0", "2"), ("4", "6"))


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=2), st.floats(0, 1), st.floats(0.3, 0.99))
@settings(deadline=None, max_examples=40)
def test_every_setting_meets_the_budget_as_cut(depths: list[float], share: float, fraction: float) -> None:
    found = plan(StagedCut(tuple(depths), share), fraction)
    small = apply_plan(net(), found)
    limit = fraction * COSTS[0].base
    assert macs(trace_network(small, INPUTS)).base == found.costs["macs"].predicted <= limit * (1 + 1e-9)
    assert all(width >= 0.1 * found.channels[name] for name, width in found.widths.items())


def test_stages_are_cut_in_the_proportions_asked_for() -> None:
    first, second = (plan(StagedCut(depths)).widths for depths in ((1.0, 0.05), (0.05, 1.0)))
    assert first["0"] < second["0"]
    assert first["6"] > second["6"]


def test_a_stage_of_depth_zero_is_left_alone() -> None:
    widths = plan(StagedCut((1.0, 0.0)), 0.7).widths
    assert widths["4"] == 24
    assert widths["6"] == 20


def test_the_greedy_share_follows_the_scores() -> None:
    cheap = {**SCORES, "6": torch.zeros(20)}
    budget = Budget("params", fraction=0.95)
    greedy = staged_plan(TRACE, cheap, COSTS, budget, StagedCut((1.0, 1.0), greedy_share=1.0))
    assert greedy.widths["6"] < 20
    assert greedy.widths["0"] == 16


def test_channels_of_largest_score_stay() -> None:
    kept = plan(StagedCut((1.0, 1.0))).kept["0"]
    best = SCORES["0"].argsort(descending=True)[: len(kept)]
    assert set(kept) == set(best.tolist())


def test_budgets_out_of_reach_and_numbers_out_of_range() -> None:
    with pytest.raises(InfeasibleBudget, match=r"no depth meets macs <= 0\.05"):
        plan(StagedCut((1.0, 0.0)), 0.05)
    with pytest.raises(BudgetError, match="a depth for each of 2 stages, got 1"):
        plan(StagedCut((1.0,)))
    with pytest.raises(BudgetError, match="a cost model for latency_ms, got macs, params"):
        staged_plan(TRACE, SCORES, COSTS, Budget("latency_ms", fraction=0.5), StagedCut((1.0, 1.0)))
    for depths, share in (((), 0.0), ((0.0, 0.0), 0.0), ((1.0, -0.1), 0.0), ((1.0, 1.0), 1.5), ((1.0, 1.0), math.nan)):
        with pytest.raises(BudgetError, match="depths of 0 or more"):
            StagedCut(depths, share)


@pytest.mark.parametrize("depth", [math.nan, math.inf, -math.inf])
def test_depths_are_finite_wherever_they_stand(depth: float) -> None:
    for depths in ((depth, 1.0), (1.0, depth), (depth, depth), (0.0, depth)):
        with pytest.raises(BudgetError, match="expected finite depths of 0 or more"):
            StagedCut(depths)
