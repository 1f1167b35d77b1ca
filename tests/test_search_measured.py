"""The descent along measured losses, against made-up losses whose best structure a brute-force loop knows."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping

import pytest

from diplugin.errors import InfeasibleBudget
from diplugin.plan import PruningPlan
from diplugin.search import Wish, measured_plan

CHANNELS = {"a": 24, "b": 24, "c": 24}
LIMIT = 30
Loss = Callable[[PruningPlan], float]


def plan_of(widths: Mapping[str, int]) -> PruningPlan:
    return PruningPlan({n: tuple(range(w)) for n, w in widths.items()}, CHANNELS)


def plan_for(wish: Wish) -> PruningPlan:
    """Widths in proportion whose sum is within the limit; in order 1 the first channels leave instead of the last."""
    profile = wish.profile
    for step in range(1000):
        factor = LIMIT / sum(profile.values()) * (1.1 - step / 1000)
        widths = {n: max(1, min(CHANNELS[n], round(factor * x))) for n, x in profile.items()}
        if sum(widths.values()) <= LIMIT:
            plan = plan_of(widths)
            last = {n: tuple(range(CHANNELS[n] - w, CHANNELS[n])) for n, w in widths.items() if wish.orders[n]}
            return PruningPlan({**plan.kept, **last}, CHANNELS)
    raise AssertionError("the limit is within reach")


def spare(a: float, b: float, c: float) -> Loss:
    """Each group suffers from being narrow, some more than others."""
    return lambda plan: a / plan.widths["a"] + b / plan.widths["b"] + c / plan.widths["c"]


def best_loss(loss: Loss) -> float:
    return min(loss(plan_of(dict(zip(CHANNELS, ws, strict=True))))
               for ws in itertools.product(range(1, 25), repeat=3) if sum(ws) <= LIMIT)  # fmt: skip


EVEN = plan_of({"a": 10, "b": 10, "c": 10})


@pytest.mark.parametrize("weights", [(9.0, 1.0, 1.0), (1.0, 16.0, 4.0), (1.0, 2.0, 9.0)], ids=str)
def test_comes_close_to_the_best_structure_there_is(weights: tuple[float, float, float]) -> None:
    loss = spare(*weights)
    found, wish = measured_plan(EVEN, plan_for, loss, orders=1, rounds=20)
    assert wish == Wish(found.widths, dict.fromkeys(CHANNELS, 0))
    assert sum(found.widths.values()) <= LIMIT
    best = best_loss(loss)
    assert loss(found) - best < 0.1 * (loss(EVEN) - best)


def test_grids_coarser_than_a_quarter_are_crossed() -> None:
    """Widths in multiples of 6: a quarter more of 6 or 12 is rounded back to what it was."""

    def coarse(wish: Wish) -> PruningPlan:
        for step in range(1000):
            factor = 2 * LIMIT / sum(wish.profile.values()) * (1 - step / 1000)
            widths = {n: min((6, 12, 18, 24), key=lambda w: abs(w - factor * x)) for n, x in wish.profile.items()}
            if sum(widths.values()) <= LIMIT:
                return plan_of(widths)
        raise InfeasibleBudget("not even the narrowest")

    start, loss = plan_of({"a": 6, "b": 12, "c": 12}), spare(9.0, 1.0, 1.0)
    found, _ = measured_plan(start, coarse, loss, orders=1, rounds=9)
    assert found.widths == {"a": 18, "b": 6, "c": 6}, "the best there is on this grid"


def test_nothing_is_measured_twice_and_the_best_of_all_comes_back() -> None:
    seen: list[tuple[float, tuple[tuple[int, ...], ...]]] = []

    def measure(plan: PruningPlan) -> float:
        value = spare(9.0, 1.0, 2.0)(plan) + math.sin(97 * sum(w * w for w in plan.widths.values()))
        seen.append((value, tuple(plan.kept.values())))
        return value

    lines: list[str] = []
    found, _ = measured_plan(EVEN, plan_for, measure, orders=2, rounds=6, tell=lines.append)
    assert max(Counter(kept for _, kept in seen).values()) == 1
    assert tuple(found.kept.values()) == min(seen)[1]
    assert 1 <= len(lines) <= 6 and f"{min(seen)[0]:.4f}" in lines[-1]


def test_a_start_that_nothing_beats_stays_after_one_round() -> None:
    lines: list[str] = []
    found, _ = measured_plan(EVEN, plan_for, lambda p: float(p is not EVEN), orders=2, rounds=9, tell=lines.append)
    assert found is EVEN and len(lines) == 1
    assert measured_plan(EVEN, plan_for, lambda _: 1.0, orders=1, rounds=9)[0] is EVEN, "no gradient at all"


@pytest.mark.parametrize("better", ["a", "bc", "abc"])
def test_every_group_finds_the_order_that_serves_it(better: str) -> None:
    def loss(plan: PruningPlan) -> float:
        wrong = sum((plan.kept[n][0] > 0) != (n in better) for n in CHANNELS)
        return spare(3.0, 2.0, 1.0)(plan) + wrong

    found, wish = measured_plan(EVEN, plan_for, loss, orders=2, rounds=3)
    assert wish.orders == {n: int(n in better) for n in CHANNELS}
    assert {n for n in CHANNELS if found.kept[n][0] > 0} == set(better)
    assert spare(3.0, 2.0, 1.0)(found) < spare(3.0, 2.0, 1.0)(EVEN), "and widths too"


def test_networks_of_no_use_and_proportions_out_of_reach_are_passed_over() -> None:
    def narrow_b_only(wish: Wish) -> PruningPlan:
        plan = plan_for(wish)
        if plan.widths["b"] > 10:
            raise InfeasibleBudget("b is too wide")
        return plan

    def broken_where_c_is_wide(plan: PruningPlan) -> float:
        return math.nan if plan.widths["c"] > 10 else spare(9.0, 1.0, 1.0)(plan)

    found, _ = measured_plan(EVEN, narrow_b_only, broken_where_c_is_wide, orders=1, rounds=9)
    assert found.widths["a"] > 12 and found.widths["b"] <= 10 and found.widths["c"] <= 10
    assert measured_plan(EVEN, plan_for, lambda _: math.nan, orders=2, rounds=9)[0] is EVEN
