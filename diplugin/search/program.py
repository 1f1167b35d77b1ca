"""The choice of widths as an integer program, solved by HiGHS through SciPy.

One 0/1 variable says that a group takes one of its widths; exactly one of them is 1. Losses are then a linear function.
A cost whose terms depend on one group is linear too; a term of two groups, a product of widths or an entry of a latency
table, gets one variable for every *pair* of widths, tied to the groups' own variables by its marginals (the local
polytope, the tightest of the usual linearisations: on a chain of layers it leaves a gap to the budget alone).

A term of more groups (a layer behind a concatenation) is split into what single groups and pairs of groups contribute
around one structure. For products of sums of widths that is exact, for a table's staircase it is not, and the program
says so. A cost's step is one more 0/1 variable: where it is 0 the step is not paid and its terms keep to its limit.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..costs import CostModel, Step, Term, Widths

Options = Mapping[str, Sequence[int]]
Pair = tuple[str, str]
_SAMPLES = 8
_TINY = 1e-9


@dataclass
class LinearCost:
    """One sum of terms over chosen widths: constant + single groups' shares + pairs' shares.

    Attributes:
        limit: what the sum may be at most.
        constant, single, pairs: shares per option and per pair of options.
        exact: whether the shares add up to the sum everywhere.
        saved, while_within: what the sum loses where another sum, the step's, keeps to its limit.
    """

    model: CostModel
    limit: float
    constant: float = 0.0
    single: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: dict[Pair, np.ndarray] = field(default_factory=dict)
    exact: bool = True
    saved: float = 0.0
    while_within: LinearCost | None = None

    @property
    def most(self) -> float:
        """What no choice of widths exceeds."""
        return self.constant + sum(float(s.max()) for s in [*self.single.values(), *self.pairs.values()])

    @property
    def never_binds(self) -> bool:
        """Whether no choice of widths can exceed the limit."""
        return self.most <= self.limit


def linear_costs(limits: Iterable[tuple[CostModel, float]], options: Options, around: Widths) -> list[LinearCost]:
    """Every sum that a limit bounds, split into shares around a structure; those that can never bind are left out.

    Args:
        limits: models that offer `sums`, each with its limit.
        options: widths per group to choose among.
        around: widths of all groups, where terms of three and more groups are split.
    """
    found = []
    for model, limit in limits:
        for terms in getattr(model, "sums"):  # noqa: B009, not part of the protocol
            cost = _linear(model, limit, terms, options, around)
            step: Step | None = getattr(model, "step", None)
            if step is not None:
                within = _linear(model, step.limit, step.terms, options, around)
                cost.saved, cost.while_within, cost.exact = step.amount, within, cost.exact and within.exact
            if not cost.never_binds:
                found.append(cost)
    return found


def _linear(model: CostModel, limit: float, terms: Iterable[Term], options: Options, around: Widths) -> LinearCost:
    cost = LinearCost(model, limit)
    for term in terms:
        _add(cost, term, options, around)
    return cost


def _add(cost: LinearCost, term: Term, options: Options, around: Widths) -> None:
    """Split one term: what it is around the structure, what each group changes, what each two change beyond that."""
    groups = sorted({*term.groups} & {*options})
    here = dict(around)

    def at(**changed: int) -> float:
        return term.value({**here, **changed})

    middle = term.value(here)
    cost.constant += middle
    alone: dict[str, np.ndarray] = {}
    for g in groups:
        alone[g] = np.array([term.value({**here, g: w}) for w in options[g]]) - middle
        cost.single[g] = cost.single.get(g, 0.0) + alone[g]
    both: dict[Pair, np.ndarray] = {}
    for g, h in itertools.combinations(groups, 2):
        if len(groups) > 2 and not _interact(term, here, g, h, options):
            continue
        values = np.array([[term.value({**here, g: w, h: v}) for v in options[h]] for w in options[g]])
        share = values - middle - alone[g][:, None] - alone[h][None, :]
        if np.abs(share).max() > _TINY * max(abs(middle), float(np.abs(values).max())):
            both[g, h] = share
            cost.pairs[g, h] = cost.pairs.get((g, h), 0.0) + share
    if len(groups) > 2:
        cost.exact &= _adds_up(term, here, middle, alone, both, options)


def _interact(term: Term, here: Widths, g: str, h: str, options: Options) -> bool:
    """Whether two groups matter to a term jointly, by the corners of their options."""
    corners = [(options[g][0], options[h][0]), (options[g][0], options[h][-1]), (options[g][-1], options[h][0])]
    middle = term.value(here)
    for w, v in corners:
        together, one, other = ({**here, g: w, h: v}, {**here, g: w}, {**here, h: v})
        joint = term.value(together) - term.value(one) - term.value(other) + middle
        if abs(joint) > _TINY * max(abs(middle), abs(term.value(together))):
            return True
    return False


def _adds_up(
    term: Term, here: Widths, middle: float, alone: Mapping[str, np.ndarray], both: Mapping[Pair, np.ndarray],
    options: Options,
) -> bool:  # fmt: skip
    """Whether shares of singles and pairs give the term at random structures."""
    draw = random.Random(0)
    for _ in range(_SAMPLES):
        pick = {g: draw.randrange(len(options[g])) for g in alone}
        want = term.value({**here, **{g: options[g][i] for g, i in pick.items()}})
        got = middle + sum(float(alone[g][i]) for g, i in pick.items())
        got += sum(float(share[pick[g], pick[h]]) for (g, h), share in both.items())
        if abs(got - want) > 1e-6 * max(abs(want), abs(middle)):
            return False
    return True


@dataclass(frozen=True)
class Solution:
    """What the solver says: widths, None if it found none, and a lower bound on the loss."""

    widths: dict[str, int] | None
    bound: float


class Program:
    """The program itself: built once for some options, solved for several tightnesses of the limits."""

    def __init__(self, options: Options, losses: Mapping[str, np.ndarray], costs: Sequence[LinearCost]) -> None:
        self.options, self.costs = options, list(costs)
        self.steps = [(i, cost.while_within) for i, cost in enumerate(self.costs) if cost.while_within is not None]
        sums = [*self.costs, *(within for _, within in self.steps)]
        self.pairs = list(dict.fromkeys(pair for cost in sums for pair in cost.pairs))
        self._start: dict[Any, int] = {}
        size = 0
        for name, count in [
            *((g, len(widths)) for g, widths in options.items()),
            *(((g, h), len(options[g]) * len(options[h])) for g, h in self.pairs),
            *((i, 1) for i, _ in self.steps),
        ]:
            self._start[name] = size
            size += count
        self.size = size
        self.binaries = sum(map(len, options.values()))
        self.scale = max((float(loss.max()) for loss in losses.values()), default=0.0) or 1.0
        self.objective = np.zeros(size)
        for g, loss in losses.items():
            self._at(self.objective, g, loss / self.scale)

    def _at(self, row: np.ndarray, name: Any, values: np.ndarray) -> None:
        start = self._start[name]
        row[start : start + values.size] += values.ravel()

    def solve(self, tightness: Mapping[str, float], seconds: float, gap: float) -> Solution:
        """Widths of least loss.

        Args:
            tightness: cost name -> factor on its limit.
            seconds: time limit.
            gap: relative distance to the bound at which to stop.
        """
        from scipy.optimize import Bounds, milp

        kinds = np.zeros(self.size)
        kinds[: self.binaries] = 1
        kinds[[self._start[i] for i, _ in self.steps]] = 1
        found = milp(
            self.objective, integrality=kinds, bounds=Bounds(0, 1), constraints=self._constraints(tightness),
            options={"time_limit": max(0.1, seconds), "mip_rel_gap": gap},
        )  # fmt: skip
        bound = getattr(found, "mip_dual_bound", None)
        bound = self.scale * float(bound) if bound is not None and np.isfinite(bound) else 0.0
        if found.x is None:
            return Solution(None, bound)
        widths = {}
        for g, choices in self.options.items():
            start = self._start[g]
            widths[g] = int(choices[int(np.argmax(found.x[start : start + len(choices)]))])
        return Solution(widths, bound)

    def _constraints(self, tightness: Mapping[str, float]) -> Any:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array, vstack

        ties, right = self._ties()
        rows, upper = [], []
        for cost in self.costs:
            rows.append(self._row(cost) / cost.limit)
            upper.append(tightness.get(cost.model.name, 1.0) - (cost.constant - cost.saved) / cost.limit)
        for i, within in self.steps:
            cost, paid = self.costs[i], self._start[i]
            # Either the step is paid and its terms are free, or they keep to its limit.
            rows[i][paid] = cost.saved / cost.limit
            rows.append(self._row(within) / within.most)
            rows[-1][paid] = -max(0.0, 1 - within.limit / within.most)
            upper.append((within.limit - within.constant) / within.most)
        if rows:
            ties = vstack([ties, csr_array(np.array(rows))])
        low: Any = np.concatenate([right, np.full(len(upper), -np.inf)])
        high: Any = np.concatenate([right, upper])
        return LinearConstraint(ties, low, high)

    def _row(self, cost: LinearCost) -> np.ndarray:
        """A sum's coefficients, its constant left out."""
        row = np.zeros(self.size)
        for name, share in [*cost.single.items(), *cost.pairs.items()]:
            self._at(row, name, share)
        return row

    def _ties(self) -> tuple[Any, np.ndarray]:
        """Rows that make choices choices: one width a group, and pairs that agree with both their groups."""
        from scipy.sparse import csr_array

        values: list[float] = []
        columns: list[int] = []
        rows: list[int] = []
        right: list[float] = []

        def add(entries: Iterable[tuple[int, float]], equals: float) -> None:
            for column, value in entries:
                columns.append(column)
                values.append(value)
                rows.append(len(right))
            right.append(equals)

        for g, widths in self.options.items():
            add(((self._start[g] + i, 1.0) for i in range(len(widths))), 1.0)
        for g, h in self.pairs:
            here, wide = self._start[g, h], len(self.options[h])
            for i in range(len(self.options[g])):
                add([*((here + i * wide + j, 1.0) for j in range(wide)), (self._start[g] + i, -1.0)], 0.0)
            for j in range(wide):
                down = ((here + i * wide + j, 1.0) for i in range(len(self.options[g])))
                add([*down, (self._start[h] + j, -1.0)], 0.0)
        return csr_array((values, (rows, columns)), shape=(len(right), self.size)), np.array(right)
