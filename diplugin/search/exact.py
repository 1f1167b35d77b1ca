"""Exact selection: the widths of least loss under all budgets, by an integer program.

Greedy selection walks down one move at a time and cannot take one back; where budgets meet plateaus, several at once
or layers that share groups, some other combination loses less. Here all groups are chosen at once (see `program`).

Greedy's plan comes first and stays unless the program beats it, so the result is never worse. Where all widths at
once make a program too large, each group is given those near its present width and ever fewer further away, and the
program is solved again around what it found until nothing improves: then the plan is good, but not proven best.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from ..costs import Budget, CostModel
from ..errors import BudgetError, DipluginError, InfeasibleBudget
from ..network import NetworkTrace
from ..plan import PruningPlan
from .curves import LossCurve, Scorer
from .greedy import greedy_search
from .problem import Limit, SearchLimits, allowed_widths, check_prunable, exceeds, limits_of
from .program import LinearCost, Pair, Program, linear_costs
from .refinement import give_back
from .structure import Structure

_TIGHTENINGS = 5
_MOST_PAIRS = 2000
_SLACK = 2e-6  # HiGHS lets constraints be violated by 1e-6


@dataclass(frozen=True)
class ExactSearch:
    """A `Search` that solves an integer program; `plan.found_by` says how good the plan is known to be.

    Attributes:
        seconds: time limit for the solver, all rounds together.
        size: most variables of a program; groups' widths are thinned until it fits.
        gap: stop when the loss is this close to the least possible, as a fraction.

    >>> ExactSearch(seconds=10.0)
    ExactSearch(seconds=10.0, size=10000, gap=0.0001)
    """

    seconds: float = 30.0
    size: int = 10_000
    gap: float = 1e-4

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.size >= 1 and 0 <= self.gap < 1):
            raise BudgetError(f"expected seconds and size above 0 and a gap in [0, 1), got {self}")

    def __call__(
        self,
        trace: NetworkTrace,
        scorer: Scorer,
        costs: Sequence[CostModel],
        budgets: Sequence[Budget],
        limits: SearchLimits | None = None,
        *,
        start: PruningPlan | None = None,
    ) -> PruningPlan:
        """The plan of least loss; the scorer is asked once, `rescore_every` is greedy's alone.

        Raises:
            BudgetError, InfeasibleBudget, ModelError: as `greedy_search`.
        """
        check_prunable(trace)
        options = replace(limits or SearchLimits(), rescore_every=0.0)
        problem = _Problem.of(trace, scorer, costs, limits_of(costs, budgets), options, start)
        try:
            greedy, failure = greedy_search(trace, problem.scorer, costs, budgets, options, start=start), None
        except InfeasibleBudget as error:
            greedy, failure = None, error
        found = _Hunt(self, problem, greedy)
        found.go()
        if found.best is None:
            assert failure is not None
            raise failure
        return replace(found.best, found_by=found.verdict)


@dataclass(frozen=True)
class _Known:
    """A `Scorer` that has been asked already."""

    known: Mapping[str, LossCurve]

    def curves(self, kept: Mapping[str, Sequence[int]]) -> Mapping[str, LossCurve]:
        return self.known


@dataclass(frozen=True)
class _Problem:
    """What is given."""

    trace: NetworkTrace
    scorer: _Known
    costs: Sequence[CostModel]
    limits: list[Limit]
    options: SearchLimits
    start: PruningPlan | None

    @classmethod
    def of(
        cls, trace: NetworkTrace, scorer: Scorer, costs: Sequence[CostModel], limits: list[Limit],
        options: SearchLimits, start: PruningPlan | None,
    ) -> _Problem:  # fmt: skip
        """With the curves of what is there at the start."""
        kept = {g.name: list(range(g.channels)) for g in trace.prunable} if start is None else start.kept
        units = {g.name: [c for c in kept[g.name] if c < g.units] for g in trace.prunable}
        return cls(trace, _Known(scorer.curves(units)), costs, limits, options, start)

    def first(self, group: str) -> int:
        """A group's width at the start."""
        return self.trace.by_name[group].channels if self.start is None else len(self.start.kept[group])

    def grids(self) -> dict[str, list[int]]:
        """Widths to choose among, the one at the start included."""
        allowed = {g.name: allowed_widths(g, self.costs, self.options) for g in self.trace.prunable}
        return {n: [*(w for w in widths if w < self.first(n)), self.first(n)] for n, widths in allowed.items()}

    def loss(self, group: str, width: int) -> float:
        lost = (self.first(group) - width) // self.trace.by_name[group].blocks
        return self.scorer.known[group].losses[lost]

    def total(self, widths: Mapping[str, int]) -> float:
        return sum(self.loss(g, w) for g, w in widths.items())

    def excess(self, widths: Mapping[str, int]) -> dict[str, float]:
        """By what fraction each cost is over its limit, over the tightest if it has several; 0 where it holds."""
        found: dict[str, float] = {}
        for model, limit in self.limits:
            cost = model.cost(widths)
            over = max(0.0, cost / limit - 1) + 1e-12 if exceeds(model, limit, cost, widths) else 0.0
            found[model.name] = max(over, found.get(model.name, 0.0))
        return found

    def plan(self, widths: Mapping[str, int]) -> PruningPlan:
        """The plan that goes to these widths and gives back what the budgets leave."""
        structure = Structure(self.trace, self.scorer, self.costs, self.limits, self.options, self.start)
        path = [*(() if self.start is None else self.start.path), structure.point()]
        for name, width in widths.items():
            if width != structure.widths[name]:
                structure.set_width(name, width)
        give_back(structure)
        return structure.plan([*path, structure.point()])


class _Hunt:
    """One search on its way: the best plan so far, and what is known about it."""

    def __init__(self, how: ExactSearch, problem: _Problem, greedy: PruningPlan | None) -> None:
        self.how, self.problem = how, problem
        self.greedy_loss = None if greedy is None else problem.total(greedy.widths)
        self.best, self.loss = greedy, float("inf") if self.greedy_loss is None else self.greedy_loss
        self.verdict = "greedy search"
        self.deadline = time.monotonic() + how.seconds

    def go(self) -> None:
        whole = self.problem.grids()
        silent = [m.name for m, _ in self.problem.limits if not hasattr(m, "sums")]
        if silent:
            self.verdict = f"greedy search: {silent[0]} is no sum of terms that a program could hold"
            return
        if self.best is not None and self.loss <= 0:
            self.verdict = "exact search: nothing is lost"
            return
        try:
            self._rounds(whole)
        except DipluginError as error:  # a table that lacks a pair of widths which greedy never asked for
            self.verdict = f"greedy search: {error}" if self.best is not None else self.verdict

    def _rounds(self, whole: Mapping[str, Sequence[int]]) -> None:
        """Solve for all widths at once, or around the best plan until nothing improves."""
        count, took = 0, 0.0
        # The solver looks at its clock only now and then: a round that would hardly fit is not begun.
        while time.monotonic() + took < self.deadline:
            began = time.monotonic()
            chosen = self._fitting(whole)
            if chosen is None:
                self.verdict = "greedy search: too many groups hang together for a program"
                return
            options, costs = chosen
            proven = options == whole and all(cost.exact for cost in costs)
            before, bound = self.loss, self._solve(options, costs)
            count, took = count + 1, time.monotonic() - began
            self.verdict = self._words(bound if proven else None, count, max(map(len, options.values())))
            if options == whole or not self.loss < before * (1 - self.how.gap):
                return

    def _fitting(
        self, whole: Mapping[str, Sequence[int]]
    ) -> tuple[Mapping[str, Sequence[int]], list[LinearCost]] | None:
        """The most options a group that the program's size allows, with their costs."""
        present = self.best.widths if self.best is not None else {g: w[len(w) // 2] for g, w in whole.items()}
        pairs = self._pairs(whole)
        if len(pairs) > _MOST_PAIRS:
            return None
        for most in _shrinking(max(map(len, whole.values()))):
            options = {g: around(widths, present[g], most) for g, widths in whole.items()}
            size = sum(map(len, options.values())) + sum(len(options[g]) * len(options[h]) for g, h in pairs)
            if size <= self.how.size:
                return options, linear_costs(self.problem.limits, options, present)
        return None

    def _pairs(self, groups: Collection[str]) -> set[Pair]:
        """Groups that meet in a term: an upper estimate of what the program must tie together."""
        return {
            pair
            for model, _ in self.problem.limits
            for terms in getattr(model, "sums")  # noqa: B009, checked in `go`
            for term in terms
            for pair in combinations(sorted({*term.groups} & {*groups}), 2)
        }

    def _solve(self, options: Mapping[str, Sequence[int]], costs: list[LinearCost]) -> float:
        """Take the solver's widths if they are better and hold; returns its lower bound on the loss."""
        losses = {g: np.array([self.problem.loss(g, w) for w in widths]) for g, widths in options.items()}
        program = Program(options, losses, costs)
        tightness = {model.name: 1.0 for model, _ in self.problem.limits}
        bound = None
        for _ in range(_TIGHTENINGS):
            solution = program.solve(tightness, self.deadline - time.monotonic(), self.how.gap)
            bound = solution.bound if bound is None else bound
            if solution.widths is None:
                break
            over = self.problem.excess(solution.widths)
            if not any(over.values()):
                self._take(solution.widths)
                break
            tightness = {name: t - (over[name] + _SLACK if over[name] else 0.0) for name, t in tightness.items()}
        return bound or 0.0

    def _take(self, widths: Mapping[str, int]) -> None:
        plan = self.problem.plan(widths)
        loss = self.problem.total(plan.widths)
        if loss < self.loss or self.best is None:
            self.best, self.loss = plan, loss

    def _words(self, bound: float | None, rounds: int, most: int) -> str:
        """How good the plan is known to be, in plain words."""
        gain = "greedy search found no plan"
        if self.greedy_loss is not None:
            saved = 1 - self.loss / self.greedy_loss if self.greedy_loss > 0 else 0.0
            gain = f"loses {saved:.2%} less than greedy search" if saved > 5e-5 else "no better than greedy search"
        if bound is None:
            tries = f"{rounds} round{'s' if rounds > 1 else ''} over at most {most} widths a group"
            return f"exact search: {gain}; {tries}, the best is not proven"
        short = max(0.0, 1 - bound / self.loss) if self.loss > 0 else 0.0
        if short <= 2 * self.how.gap:
            spared = 100 * max(short, self.how.gap, 1e-6)
            return f"exact search: {gain}; proven: no plan on these widths loses {spared:.2g} % less"
        return f"exact search: {gain}; out of time, no plan on these widths loses {short:.1%} less"


def _shrinking(longest: int) -> Iterator[int]:
    """Options a group to try, from all down to three."""
    most = longest
    while most > 3:
        yield most
        most = min(most - 1, int(most * 0.8))
    yield min(longest, 3)


def around(widths: Sequence[int], present: int, most: int) -> list[int]:
    """At most `most` of ascending widths: the ends, the present one, its neighbours, and ever fewer further away.

    >>> around(range(1, 101), 50, 9)
    [1, 25, 47, 49, 50, 51, 53, 74, 100]
    """
    if len(widths) <= most:
        return list(widths)
    here = min(range(len(widths)), key=lambda i: abs(widths[i] - present))
    chosen = dict.fromkeys((here, 0, len(widths) - 1))
    # Distances grow by one factor, so that the last ones just reach the ends.
    per_side = max(1, (most - len(chosen)) // 2)
    growth = len(widths) ** (1 / per_side)
    distances = dict.fromkeys(max(step + 1, round(growth**step)) for step in range(per_side))
    for distance in distances:
        for i in (here - distance, here + distance):
            if 0 <= i < len(widths) and len(chosen) < most:
                chosen[i] = None
    for i in sorted(range(len(widths)), key=lambda i: abs(i - here)):
        if len(chosen) >= most:
            break
        chosen[i] = None
    return [widths[i] for i in sorted(chosen)]
