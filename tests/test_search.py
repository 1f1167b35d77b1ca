"""Greedy search against brute force over every width combination, on problems small enough for it.

No network here: groups with made-up costs and losses, some separable, some coupled, some with staircases and bumps as
real devices have them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from made_up_searches import best_loss, chain, group, loss_of, made_up, problems, search, staircase, trace_of
from torch import Tensor

from diplugin.costs import Budget, SeparableCost, Term, Widths
from diplugin.errors import BudgetError, DataError, InfeasibleBudget, ModelError
from diplugin.network import NetworkTrace
from diplugin.plan import PruningPlan
from diplugin.search import FixedScores, LossCurve, SearchLimits, first_order_curve, greedy_search


class Peak:
    """A cost that is a maximum: no single group lowers it where two layers tie."""

    name, unit = "memory_mb", "MB"

    def __init__(self, trace: NetworkTrace) -> None:
        self._widths, self._names = trace.base_widths, [g.name for g in trace.prunable]

    @property
    def base(self) -> float:
        return self.cost(self._widths)

    def cost(self, widths: Widths) -> float:
        return float(max(widths[a] + widths[b] for a, b in itertools.pairwise(self._names)))

    def change(self, widths: Widths, group: str, width: int) -> float:
        return self.cost({**widths, group: width}) - self.cost(widths)


def assert_nothing_more_fits(
    plan: PruningPlan, trace: NetworkTrace, limits: Sequence[tuple[SeparableCost, float]]
) -> None:
    """No single group can be one unit wider within the budgets."""
    for g in trace.prunable:
        wider = {**plan.widths, g.name: plan.widths[g.name] + g.blocks}
        if wider[g.name] <= g.channels:
            assert any(cost.cost(wider) > limit for cost, limit in limits), f"{g.name} could be wider"


@settings(max_examples=60)
@given(problem=problems, fraction=st.floats(0.05, 1.0))
def test_one_budget_against_brute_force(problem: tuple[NetworkTrace, dict[str, Tensor]], fraction: float) -> None:
    trace, scores = problem
    cost = chain(trace)
    limit = fraction * cost.base
    optimum = best_loss(trace, scores, [(cost, limit)], slack=1e-12)
    try:
        plan = search(trace, scores, [cost], [Budget("macs", fraction=fraction)])
    except InfeasibleBudget:
        assert best_loss(trace, scores, [(cost, limit)]) == math.inf
        return
    assert cost.cost(plan.widths) <= limit
    assert plan.costs["macs"].predicted == cost.cost(plan.widths)
    assert_nothing_more_fits(plan, trace, [(cost, limit)])
    got = loss_of(trace, scores, plan.widths)
    assert plan.path[-1].loss == pytest.approx(got, abs=1e-9)
    # Greedy is no optimiser of integer programs this small; it must stay in the optimum's neighbourhood.
    worst_unit = max(float(s.max()) * g.blocks for g, s in zip(trace.prunable, scores.values(), strict=True))
    assert optimum - 1e-9 <= got <= 2 * optimum + 2 * worst_unit


@settings(max_examples=60)
@given(problem=problems, fractions=st.tuples(st.floats(0.2, 1.0), st.floats(0.2, 1.0)), step=st.integers(2, 5),
       bump=st.floats(0.0, 3.0))  # fmt: skip
@example(problem=made_up([(5, 1), (8, 1)], 672), fractions=(0.33, 0.95), step=5, bump=2.0)  # (1, 5) and (5, 1) alone
@example(problem=made_up([(8, 2), (5, 1), (6, 3)], 1231), fractions=(0.39, 0.93), step=5, bump=2.0)
@example(problem=made_up([(5, 1), (5, 1), (6, 3)], 2690), fractions=(0.61, 0.48), step=3, bump=0.5)
def test_several_budgets_hold_at_once(
    problem: tuple[NetworkTrace, dict[str, Tensor]], fractions: tuple[float, float], step: int, bump: float
) -> None:
    """Wherever some structure meets both, also where MACs lead down to widths at which latency is over."""
    trace, scores = problem
    costs = [chain(trace), staircase(trace, step, bump)]
    limits = [(cost, f * cost.base) for cost, f in zip(costs, fractions, strict=True)]
    budgets = [Budget(cost.name, fraction=f) for cost, f in zip(costs, fractions, strict=True)]
    try:
        plan = search(trace, scores, costs, budgets)
    except InfeasibleBudget:
        assert best_loss(trace, scores, limits) == math.inf
        return
    assert all(cost.cost(plan.widths) <= limit * (1 + 1e-12) for cost, limit in limits)
    assert_nothing_more_fits(plan, trace, limits)


@settings(max_examples=60)
@given(problem=problems, fraction=st.floats(0.2, 1.0), step=st.integers(2, 5), bump=st.floats(0.0, 3.0))
@example(problem=made_up([(5, 1), (8, 1), (5, 1)], 1581), fraction=0.625, step=4, bump=0.5)  # 5 is over, 8 is not
@example(problem=made_up([(2, 1)], 0), fraction=0.9999999999999999, step=2, bump=0.0)  # over by a rounding error
def test_staircases_and_bumps_are_crossed(
    problem: tuple[NetworkTrace, dict[str, Tensor]], fraction: float, step: int, bump: float
) -> None:
    """Wherever some structure meets the budget on a bumpy latency, the search finds one too."""
    trace, scores = problem
    cost = staircase(trace, step, bump)
    limit = fraction * cost.base
    try:
        plan = search(trace, scores, [cost], [Budget("latency_ms", fraction=fraction)])
    except InfeasibleBudget:
        assert best_loss(trace, scores, [(cost, limit)]) == math.inf
        return
    assert cost.cost(plan.widths) <= limit * (1 + 1e-12)
    for g in trace.prunable:
        for wider in range(plan.widths[g.name] + g.blocks, g.channels + 1, g.blocks):
            assert cost.cost({**plan.widths, g.name: wider}) > limit, f"{g.name} could be {wider} wide"


@settings(max_examples=40)
@given(problem=problems, fraction=st.floats(0.1, 1.0))
def test_a_maximum_with_ties_is_brought_down(problem: tuple[NetworkTrace, dict[str, Tensor]], fraction: float) -> None:
    """Two layers of equal memory: narrowing one group alone frees nothing, yet the budget can be met."""
    trace, scores = problem
    if len(trace.prunable) < 2:
        return
    cost = Peak(trace)
    limit = fraction * cost.base
    try:
        plan = search(trace, scores, [cost], [Budget("memory_mb", fraction=fraction)])
    except InfeasibleBudget:
        assert best_loss(trace, scores, [(cost, limit)]) == math.inf
        return
    assert cost.cost(plan.widths) <= limit


def test_equal_layers_tie_in_memory() -> None:
    trace = trace_of(*(group(f"g{i}", 8) for i in range(4)))
    scores = {g.name: torch.linspace(0.1, 0.8, 8, dtype=torch.float64) for g in trace.prunable}
    plan = search(trace, scores, [Peak(trace)], [Budget("memory_mb", fraction=0.5)])
    assert plan.costs["memory_mb"].predicted <= 8


def test_the_cheapest_information_leaves_first() -> None:
    """Equal costs: the plan keeps the channels of largest score, wherever they are."""
    trace = trace_of(group("a", 4), group("b", 4))
    scores = {"a": torch.tensor([0.1, 0.9, 0.2, 0.8]).double(), "b": torch.tensor([0.7, 0.3, 0.6, 0.05]).double()}
    cost = SeparableCost("macs", "", trace.base_widths, [Term((n,), lambda w, n=n: float(w[n])) for n in ("a", "b")])
    plan = search(trace, scores, [cost], [Budget("macs", fraction=0.5)])
    assert plan.kept == {"a": (1, 3), "b": (0, 2)}


def test_information_is_weighed_against_cost() -> None:
    """Of two equally informative groups, the one whose channels cost ten times more gives first."""
    trace = trace_of(group("dear", 8), group("cheap", 8))
    scores = {name: torch.full((8,), 0.1, dtype=torch.float64) for name in ("dear", "cheap")}
    weights = {"dear": 10.0, "cheap": 1.0}
    terms = [Term((n,), lambda w, n=n: weights[n] * w[n]) for n in weights]
    cost = SeparableCost("macs", "", trace.base_widths, terms)
    plan = search(trace, scores, [cost], [Budget("macs", fraction=0.6)])
    assert plan.widths["cheap"] == 8
    assert plan.widths["dear"] == 4


def test_a_budget_that_holds_already_removes_nothing() -> None:
    trace = trace_of(group("a", 4))
    plan = search(trace, {"a": torch.ones(4).double()}, [chain(trace)], [Budget("macs", fraction=1.0)])
    assert plan.kept == {"a": (0, 1, 2, 3)}


def test_infeasible_names_the_cheapest_structure() -> None:
    trace = trace_of(group("a", 8), group("b", 8))
    scores = {n: torch.ones(8).double() for n in ("a", "b")}
    cost = chain(trace)
    with pytest.raises(InfeasibleBudget) as caught:
        search(trace, scores, [cost], [Budget("macs", limit=5.0)], SearchLimits(floor=0.5))
    text = str(caught.value)
    assert f"{cost.cost({'a': 4, 'b': 4}):.6g}" in text, "what the cheapest one costs"
    assert "macs <= 5" in text
    assert "4 channels" in text
    assert "relax the budget" in text
    assert "\n" not in text
    assert caught.value.exit_code == 3


def test_no_budget_and_unknown_costs() -> None:
    trace = trace_of(group("a", 8))
    scores = {"a": torch.ones(8).double()}
    with pytest.raises(BudgetError, match="got none"):
        search(trace, scores, [chain(trace)], [])
    with pytest.raises(BudgetError, match="latency table"):
        search(trace, scores, [chain(trace)], [Budget("latency_ms", limit=3.0)])
    with pytest.raises(BudgetError, match="speed"):
        search(trace, scores, [chain(trace)], [Budget("speed", fraction=0.5)])


def test_nothing_to_prune_says_why() -> None:
    noted = trace_of(group("a", 8, note="its channels are an output of the model"))
    with pytest.raises(ModelError, match="output of the model"):
        greedy_search(noted, FixedScores((), {}), [chain(trace_of(group("a", 8)))], [Budget("macs", fraction=0.5)])
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        greedy_search(trace_of(), FixedScores((), {}), [], [Budget("macs", fraction=0.5)])


def test_noted_groups_are_in_no_plan() -> None:
    trace = trace_of(group("a", 8), group("left", 8, note="tied to a shortcut"))
    plan = search(
        trace, {"a": torch.ones(8).double()}, [chain(trace_of(group("a", 8)))], [Budget("macs", fraction=0.5)]
    )
    assert set(plan.kept) == {"a"}


def test_costs_without_a_budget_are_recorded_too() -> None:
    trace = trace_of(group("a", 8), group("b", 8))
    scores = {n: torch.rand(8).double() for n in ("a", "b")}
    costs = [chain(trace), staircase(trace, 4, 0.5)]
    plan = search(trace, scores, costs, [Budget("macs", fraction=0.5)])
    assert plan.costs["latency_ms"].predicted == costs[1].cost(plan.widths)
    assert plan.costs["latency_ms"].base == costs[1].base


def test_two_budgets_on_one_cost() -> None:
    trace = trace_of(group("a", 8), group("b", 8))
    scores = {n: torch.rand(8).double() for n in ("a", "b")}
    plan = search(trace, scores, [chain(trace)], [Budget("macs", fraction=0.8), Budget("macs", limit=40.0)])
    assert plan.costs["macs"].predicted <= 40.0


def test_path_goes_from_the_whole_network_to_the_plan() -> None:
    trace = trace_of(group("a", 64), group("b", 64))
    scores = {n: torch.rand(64).double() for n in ("a", "b")}
    cost = chain(trace)
    plan = search(trace, scores, [cost], [Budget("macs", fraction=0.3)])
    assert plan.path[0].loss == 0
    assert plan.path[0].costs["macs"] == cost.base
    assert plan.path[-1].costs["macs"] == pytest.approx(plan.costs["macs"].predicted)
    falling = [p.costs["macs"] for p in plan.path[:-1]]
    assert falling == sorted(falling, reverse=True)
    assert plan.inputs == trace.inputs


def test_the_same_twice() -> None:
    trace = trace_of(group("a", 32), group("b", 32), group("c", 32))
    scores = {g.name: torch.rand(32).double().round(decimals=1) for g in trace.prunable}
    first, second = (search(trace, scores, [chain(trace)], [Budget("macs", fraction=0.4)]) for _ in range(2))
    assert first == second


class Recorder:
    """Scores that are recomputed for whatever is left, and a record of what was asked."""

    def __init__(self, trace: NetworkTrace, scores: Mapping[str, Tensor]) -> None:
        self._inner, self.asked = FixedScores(trace.prunable, scores), []

    def curves(self, kept: Mapping[str, Sequence[int]]) -> Mapping[str, LossCurve]:
        self.asked.append({name: tuple(units) for name, units in kept.items()})
        return self._inner.curves(kept)


def test_scores_are_asked_again_on_the_way() -> None:
    trace = trace_of(group("a", 32), group("b", 32))
    scorer = Recorder(trace, {n: torch.rand(32).double() for n in ("a", "b")})
    limits = SearchLimits(floor=0.0, rescore_every=0.1)
    plan = greedy_search(trace, scorer, [chain(trace)], [Budget("macs", fraction=0.4)], limits)
    assert 4 <= len(scorer.asked) <= 7
    shrinking = [sum(map(len, kept.values())) for kept in scorer.asked]
    assert shrinking == sorted(shrinking, reverse=True)
    assert len(set(shrinking)) == len(shrinking)
    assert plan.costs["macs"].fraction <= 0.4
    for earlier, later in itertools.pairwise(scorer.asked):
        assert all(set(later[n]) <= set(earlier[n]) for n in later), "what has left stays gone"


def test_rescoring_with_unchanging_scores_changes_little() -> None:
    trace = trace_of(group("a", 32), group("b", 32))
    scores = {n: torch.rand(32).double() for n in ("a", "b")}
    once = search(trace, scores, [chain(trace)], [Budget("macs", fraction=0.4)])
    often = search(trace, scores, [chain(trace)], [Budget("macs", fraction=0.4)], SearchLimits(0.0, 1, 0.05))
    assert loss_of(trace, scores, often.widths) <= 1.2 * loss_of(trace, scores, once.widths)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    trace = trace_of(group("whole", 4), group("broken", 4))
    scores = {"whole": torch.ones(4).double(), "broken": torch.tensor([0.1, bad, 0.2, 0.3]).double()}
    with pytest.raises(DataError, match=r"group broken, got NaN or infinity for 1 of 4 channels") as caught:
        search(trace, scores, [chain(trace)], [Budget("macs", fraction=0.5)])
    assert "\n" not in str(caught.value)


def test_first_order_curve() -> None:
    g = group("a", 6, blocks=2)
    curve = first_order_curve(g, torch.tensor([0.3, 0.1, 0.2, 0.3, 0.1, -0.5], dtype=torch.float64))
    assert curve.order == (2, 1, 0)
    assert curve.losses == pytest.approx((0.0, 0.0, 0.2, 0.8))
    assert first_order_curve(g, torch.ones(6), units=[2, 0]).order == (0, 2)
