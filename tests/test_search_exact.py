"""Exact search against brute force over every width combination, and against greedy search where that is too much."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_up_searches import ANY_WIDTH, best_loss, chain, loss_of, made_up, problems
from torch import Tensor, nn

from diplugin.costs import Budget, CostModel, LatencyCost, PeakActivationMemory, SeparableCost, Term, macs, params
from diplugin.costs.latency import timed_layers
from diplugin.errors import BudgetError, InfeasibleBudget, ModelError
from diplugin.latency.grid import layer_keys
from diplugin.network import NetworkTrace, trace_network
from diplugin.plan import PruningPlan
from diplugin.search import ExactSearch, FixedScores, GreedySearch, SearchLimits
from diplugin.search.exact import around
from diplugin.search.program import Program, Solution
from diplugin.tables import Alignment, Calibration, Entry, LatencyTable, OpKey, Setting

EXACT = ExactSearch(seconds=20.0, gap=1e-9)


def stairs(trace: NetworkTrace, step: int, bump: float) -> SeparableCost:
    """Latency of neighbours, flat between multiples of `step` and dearer by `bump` off them."""

    def at(width: int) -> float:
        return math.ceil(width / step) + (bump if width % step else 0.0)

    names = [g.name for g in trace.prunable]
    terms = [Term((n,), lambda w, n=n: at(w[n])) for n in names]
    terms += [Term((a, b), lambda w, a=a, b=b: at(w[a]) * at(w[b])) for a, b in itertools.pairwise(names)]
    return SeparableCost("latency_ms", "ms", trace.base_widths, terms)


def joined(trace: NetworkTrace) -> SeparableCost:
    """A layer that reads all groups side by side, as behind a concatenation, and writes as many as the first keeps."""
    names = tuple(g.name for g in trace.prunable)
    terms = [Term(names, lambda w: float((5 + sum(w[n] for n in names)) * w[names[0]]))]
    return SeparableCost("macs", "", trace.base_widths, terms)


def check(
    trace: NetworkTrace, scores: Mapping[str, Tensor], costs: Sequence[CostModel], fractions: Sequence[float],
    search: ExactSearch = EXACT,
) -> PruningPlan | None:  # fmt: skip
    """Search under fractions of the costs and compare with brute force; the plan, or None where there is none."""
    limits = [(cost, f * cost.base) for cost, f in zip(costs, fractions, strict=True)]
    budgets = [Budget(cost.name, fraction=f) for cost, f in zip(costs, fractions, strict=True)]
    optimum = best_loss(trace, scores, limits)
    try:
        plan = search(trace, FixedScores(trace.prunable, scores), costs, budgets, ANY_WIDTH)
    except InfeasibleBudget:
        assert optimum == math.inf
        return None
    assert all(cost.cost(plan.widths) <= limit for cost, limit in limits)
    assert loss_of(trace, scores, plan.widths) == pytest.approx(optimum, rel=1e-6, abs=1e-9)
    assert plan.path[-1].loss == pytest.approx(optimum, rel=1e-6, abs=1e-9)
    return plan


@settings(max_examples=40, deadline=None)
@given(problem=problems, fraction=st.floats(0.05, 1.0))
@example(problem=made_up([(2, 1)], 0), fraction=1.0 - 2**-53)  # a limit that only rounding puts below the cost
def test_one_budget(problem: tuple[NetworkTrace, dict[str, Tensor]], fraction: float) -> None:
    trace, scores = problem
    check(trace, scores, [chain(trace)], [fraction])


@settings(max_examples=30, deadline=None)
@given(problem=problems, fractions=st.tuples(st.floats(0.2, 1.0), st.floats(0.2, 1.0)), step=st.integers(2, 4))
def test_two_budgets_at_once(
    problem: tuple[NetworkTrace, dict[str, Tensor]], fractions: tuple[float, float], step: int
) -> None:
    trace, scores = problem
    check(trace, scores, [chain(trace), stairs(trace, step, 0.0)], fractions)


@settings(max_examples=30, deadline=None)
@given(problem=problems, fraction=st.floats(0.2, 1.0), step=st.integers(2, 5), bump=st.floats(0.0, 3.0))
def test_plateaus_and_bumps(
    problem: tuple[NetworkTrace, dict[str, Tensor]], fraction: float, step: int, bump: float
) -> None:
    trace, scores = problem
    check(trace, scores, [stairs(trace, step, bump)], [fraction])


@settings(max_examples=20, deadline=None)
@given(problem=problems, fraction=st.floats(0.2, 1.0))
def test_a_concatenation_of_groups(problem: tuple[NetworkTrace, dict[str, Tensor]], fraction: float) -> None:
    trace, scores = problem
    check(trace, scores, [joined(trace)], [fraction])


class Tiny(nn.Module):
    """Two layers with a shortcut around one of them, and a branch beside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.outer, self.branch = nn.Conv2d(5, 6, 1), nn.Conv2d(6, 4, 3, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(torch.relu(self.branch(x)).mean((2, 3)))


def tiny() -> tuple[NetworkTrace, dict[str, Tensor]]:
    torch.manual_seed(0)
    trace = trace_network(Tiny().eval(), (torch.zeros(1, 3, 8, 8),))
    return trace, {g.name: torch.rand(g.channels, dtype=torch.float64) for g in trace.prunable}


def table_with_plateaus(trace: NetworkTrace) -> LatencyTable:
    """Every width of every layer; time by whole fours, and a third more off the step of two."""
    grid = {g.name: range(1, g.channels + 1) for g in trace.prunable}
    keys = {key for layer in timed_layers(trace) for key in layer_keys(layer, grid, trace.base_widths)}

    def ms(key: OpKey) -> float:
        area = math.prod(key.output_size) * math.prod(key.kernel)
        stair = math.ceil(key.cin / 4) * math.ceil(key.cout / 4) * area / 100
        return (stair + 0.1) * (1.0 if key.cout % 2 == 0 else 1.3)

    return LatencyTable(
        "plateaus", "made up", Setting("onnxruntime", "1", "CPUExecutionProvider", "all", 1),
        tuple(Entry(key, ms(key), ms(key), ms(key), 0.0) for key in sorted(keys)),
        alignment=Alignment(1, 1), calibration=Calibration(1.1, 0.2, 12, 0.01, 0.02, 1.0),
    )  # fmt: skip


@pytest.mark.parametrize("fraction", [0.9, 0.75, 0.6, 0.45])
def test_a_latency_table_with_plateaus(fraction: float) -> None:
    trace, scores = tiny()
    cost = LatencyCost(trace, table_with_plateaus(trace))
    # The search keeps to the lower envelope of each group's staircase.
    grid = {n: cost.allowed_widths(n) or (c,) for n, c in trace.base_widths.items()}
    limits = [(cost, fraction * cost.base)]
    plan = EXACT(trace, FixedScores(trace.prunable, scores), [cost], [Budget(cost.name, fraction=fraction)], ANY_WIDTH)
    optimum = best_loss(trace, scores, limits, grid)
    assert plan.costs["latency_ms"].fraction <= fraction * (1 + 1e-12)
    assert loss_of(trace, scores, plan.widths) == pytest.approx(optimum, rel=1e-6)
    assert "proven" in plan.found_by


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("fits", [0.3, 0.5, 0.7])
def test_a_latency_table_with_a_refill(share: float, fits: float) -> None:
    """Some budgets hold with the refill paid, some only because a net fits into the cache."""
    trace, scores = tiny()
    table = table_with_plateaus(trace)
    smooth = tuple(entry._replace(latency_ms=1e-4 * entry.key.macs + 0.01) for entry in table.entries)
    calibration = Calibration(1.1, 0.2, 12, 0.01, 0.02, 1.0, refill_ms=2.0,
                              cache_mb=fits * weights_mb(trace, trace.base_widths))  # fmt: skip
    cost = LatencyCost(trace, replace(table, entries=smooth, calibration=calibration))
    grid = {n: cost.allowed_widths(n) or (c,) for n, c in trace.base_widths.items()}
    least = cost.cost({n: widths[0] for n, widths in grid.items()})
    limit = least + share * (cost.base - least)
    optimum = best_loss(trace, scores, [(cost, limit)], grid)
    scorer, budget = FixedScores(trace.prunable, scores), [Budget(cost.name, limit=limit)]
    for search in (GreedySearch(), EXACT):
        plan = search(trace, scorer, [cost], budget, ANY_WIDTH)
        ms = calibration.predict(cost.sum_ms(plan.widths), weights_mb(trace, plan.widths))
        assert ms == pytest.approx(plan.costs["latency_ms"].predicted) and ms <= limit * (1 + 1e-12)
        assert plan.path[-1].costs["latency_ms"] == pytest.approx(ms)
        for g in trace.prunable:  # what the budget leaves was given back
            wider = [w for w in grid[g.name] if w > plan.widths[g.name]]
            assert not wider or cost.cost({**plan.widths, g.name: wider[0]}) > limit
    assert loss_of(trace, scores, plan.widths) == pytest.approx(optimum, rel=1e-6)
    assert "proven" in plan.found_by and "not proven" not in plan.found_by


def weights_mb(trace: NetworkTrace, widths: Mapping[str, int]) -> float:
    return sum(layer.key(widths).weight_bytes for layer in timed_layers(trace)) / 1e6


@pytest.mark.parametrize("fractions", [(0.7, 0.8, 0.9), (0.5, 0.6, 0.6), (0.9, 0.4, 1.0)])
def test_a_real_network_under_macs_parameters_and_memory(fractions: tuple[float, float, float]) -> None:
    trace, scores = tiny()
    check(trace, scores, [macs(trace), params(trace), PeakActivationMemory(trace)], fractions)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([(16, 1), (24, 1), (32, 2), (64, 1)]), min_size=3, max_size=8),
    seed=st.integers(0, 2**16), fractions=st.tuples(st.floats(0.3, 0.9), st.floats(0.3, 0.9)),
    size=st.sampled_from([200, 2000]),
)  # fmt: skip
def test_never_worse_than_greedy(
    sizes: list[tuple[int, int]], seed: int, fractions: tuple[float, float], size: int
) -> None:
    """On larger problems, with widths thinned until the program is small."""
    trace, scores = made_up(sizes, seed)
    costs = [chain(trace), stairs(trace, 4, 0.5)]
    budgets = [Budget(cost.name, fraction=f) for cost, f in zip(costs, fractions, strict=True)]
    scorer = FixedScores(trace.prunable, scores)
    try:
        greedy = GreedySearch()(trace, scorer, costs, budgets)
    except InfeasibleBudget:
        return
    exact = ExactSearch(seconds=2.0, size=size)(trace, scorer, costs, budgets)
    assert loss_of(trace, scores, exact.widths) <= loss_of(trace, scores, greedy.widths) * (1 + 1e-9)
    assert all(exact.costs[b.cost].fraction <= (b.fraction or 0) * (1 + 1e-12) for b in budgets)
    assert exact.found_by


def test_it_finds_what_greedy_walks_past() -> None:
    """Greedy takes the best ratio first and overshoots; the two cheap groups lose less, but only both together."""
    trace, _ = made_up([(2, 1), (2, 1), (2, 1)], 0)
    scores = {"g0": torch.tensor([1.0, 9.0]), "g1": torch.tensor([0.45, 9.0]), "g2": torch.tensor([0.45, 9.0])}
    weights = {"g0": 10.0, "g1": 4.0, "g2": 4.0}
    cost = SeparableCost("macs", "", trace.base_widths, [Term((n,), lambda w, n=n: weights[n] * w[n]) for n in weights])
    scorer = FixedScores(trace.prunable, {n: s.double() for n, s in scores.items()})
    budget = [Budget("macs", limit=cost.base - 8)]
    greedy, exact = GreedySearch()(trace, scorer, [cost], budget), EXACT(trace, scorer, [cost], budget)
    assert greedy.widths["g0"] == 1
    assert exact.widths["g0"] == 2 and exact.path[-1].loss == pytest.approx(0.9)
    assert "less than greedy search" in exact.found_by


class Peak:
    """A cost that offers no sums."""

    name, unit, base = "memory_mb", "MB", 8.0

    def cost(self, widths: Mapping[str, int]) -> float:
        return float(max(widths.values()))

    def change(self, widths: Mapping[str, int], group: str, width: int) -> float:
        return self.cost({**widths, group: width}) - self.cost(widths)


def test_a_cost_without_sums_leaves_greedys_plan() -> None:
    trace, scores = made_up([(8, 1)], 0)
    plan = EXACT(trace, FixedScores(trace.prunable, scores), [Peak()], [Budget("memory_mb", fraction=0.5)])
    assert plan.widths == {"g0": 4} and "memory_mb is no sum" in plan.found_by


def test_infeasible_budgets_and_networks_without_groups() -> None:
    trace, scores = made_up([(8, 1), (8, 1)], 0)
    scorer, cost = FixedScores(trace.prunable, scores), chain(trace)
    with pytest.raises(InfeasibleBudget, match=r"relax the budget or lower the floor of 0\.5$"):
        EXACT(trace, scorer, [cost], [Budget("macs", limit=5.0)], SearchLimits(floor=0.5))
    with pytest.raises(InfeasibleBudget, match="the alignment to 8"):
        EXACT(trace, scorer, [cost], [Budget("macs", limit=5.0)], SearchLimits(align=8))
    with pytest.raises(BudgetError, match="got none"):
        EXACT(trace, scorer, [cost], [])
    empty = NetworkTrace((), (), ())
    with pytest.raises(ModelError, match="found none"):
        EXACT(empty, FixedScores((), {}), [cost], [Budget("macs", fraction=0.5)])


def test_no_time_at_all_leaves_greedys_plan() -> None:
    trace, scores = made_up([(64, 1)] * 6, 0)
    scorer, cost = FixedScores(trace.prunable, scores), chain(trace)
    budget = [Budget("macs", fraction=0.4)]
    plan = ExactSearch(seconds=1e-6)(trace, scorer, [cost], budget)
    assert plan.widths == GreedySearch()(trace, scorer, [cost], budget).widths and "greedy" in plan.found_by


def test_it_goes_on_from_an_earlier_plan() -> None:
    """What an earlier plan removed stays gone, and of what is left the best is kept."""
    trace, scores = made_up([(8, 1), (8, 1), (6, 3)], 3)
    scorer, cost = FixedScores(trace.prunable, scores), chain(trace)
    first = EXACT(trace, scorer, [cost], [Budget("macs", fraction=0.7)], ANY_WIDTH)
    second = EXACT(trace, scorer, [cost], [Budget("macs", fraction=0.4)], ANY_WIDTH, start=first)
    grid = {g.name: range(g.blocks, first.widths[g.name] + 1, g.blocks) for g in trace.prunable}
    assert all(set(second.kept[n]) <= set(first.kept[n]) for n in first.kept)
    assert loss_of(trace, scores, second.widths) == pytest.approx(
        best_loss(trace, scores, [(cost, 0.4 * cost.base)], grid)
    )
    assert second.path[-1].loss == pytest.approx(loss_of(trace, scores, second.widths))
    assert second.costs["macs"].base == cost.base


@pytest.mark.parametrize("order", [1, -1])
def test_two_budgets_on_one_cost(order: int) -> None:
    trace, scores = made_up([(8, 1), (8, 1)], 5)
    cost = chain(trace)
    budgets = [Budget("macs", fraction=0.4), Budget("macs", fraction=0.9)][::order]
    plan = EXACT(trace, FixedScores(trace.prunable, scores), [cost], budgets, ANY_WIDTH)
    assert plan.costs["macs"].fraction <= 0.4
    assert plan.path[-1].loss == pytest.approx(best_loss(trace, scores, [(cost, 0.4 * cost.base)]))


def test_a_budget_that_holds_already() -> None:
    trace, scores = made_up([(4, 1)], 0)
    plan = EXACT(trace, FixedScores(trace.prunable, scores), [chain(trace)], [Budget("macs", fraction=1.0)])
    assert plan.widths == {"g0": 4} and plan.found_by == "exact search: nothing is lost"


def test_its_words_travel_with_the_plan() -> None:
    trace, scores = made_up([(8, 1), (8, 1)], 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = EXACT(trace, FixedScores(trace.prunable, scores), [chain(trace)], [Budget("macs", fraction=0.5)])
    assert "proven" in plan.found_by
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_no_more_is_called_proven_than_the_bound_says(monkeypatch: pytest.MonkeyPatch) -> None:
    trace, scores = made_up([(8, 1), (8, 1)], 0)
    optimum = best_loss(trace, scores, [(chain(trace), 0.5 * chain(trace).base)])
    solve = Program.solve

    def with_a_weak_bound(self: Program, *args: Any) -> Solution:
        return replace(solve(self, *args), bound=0.85 * optimum)

    monkeypatch.setattr(Program, "solve", with_a_weak_bound)
    scorer, budget = FixedScores(trace.prunable, scores), [Budget("macs", fraction=0.5)]
    plan = ExactSearch(seconds=20.0, gap=0.1)(trace, scorer, [chain(trace)], budget, ANY_WIDTH)
    assert loss_of(trace, scores, plan.widths) == pytest.approx(optimum)
    assert plan.found_by.endswith("proven: no plan on these widths loses 15 % less")


@given(channels=st.integers(1, 200), most=st.integers(3, 30), present=st.integers(1, 200))
def test_thinned_widths_keep_the_ends_and_the_present_one(channels: int, most: int, present: int) -> None:
    widths = list(range(1, channels + 1))
    chosen = around(widths, min(present, channels), most)
    assert chosen == sorted(set(chosen)) and len(chosen) == min(most, channels)
    assert {1, channels, min(present, channels)} <= set(chosen)


@pytest.mark.parametrize("bad", [{"seconds": 0.0}, {"size": 0}, {"gap": 1.0}, {"gap": -0.1}, {"seconds": math.nan}])
def test_settings_that_mean_nothing(bad: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="expected seconds"):
        ExactSearch(**bad)  # type: ignore[arg-type]
