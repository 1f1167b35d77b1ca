"""Greedy selection: give up the channels with the least discriminant information per unit of cost, until budgets hold.

No model and no data here: a `LossCurve` says in which order a group's units leave and how much information is lost
with each, cost models say what that frees, and a `Scorer` may bring fresh curves on the way.

Each step looks, in every group, over the widths that may come next and takes the one with the least loss per cost
freed, where cost means the budgets still violated, each as a share of what it is over. Looking over many widths at
once is what carries the search across plateaus and bumps of a measured latency: a step that frees nothing is never
taken, one that ends beyond the plateau is. When all budgets hold, channels are given back, dearest first, as long as
they still hold.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from .costs import Budget, CostModel
from .errors import BudgetError, InfeasibleBudget, ModelError
from .groups import ChannelGroup
from .network import NetworkTrace
from .plan import PathPoint, PlannedCost, PruningPlan

_LOOK_AHEAD = 12
_LEVELS = 128


@dataclass(frozen=True)
class LossCurve:
    """In which order a group's remaining units leave, and the total loss once the first k of them are gone.

    Attributes:
        order: units, first to leave first.
        losses: len(order) + 1 non-decreasing numbers from 0, in the unit that all curves of a search share.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]


def first_order_curve(group: ChannelGroup, scores: Tensor, units: Sequence[int] | None = None) -> LossCurve:
    """Units by ascending score; losses add up (a unit's score is the sum over its channels).

    Args:
        scores: [group.channels], the loss of removing each channel alone.
        units: the ones still there; None for all.
    """
    per_unit = scores.view(group.blocks, group.units).sum(0).tolist()
    order = sorted(range(group.units) if units is None else units, key=lambda u: (per_unit[u], u))
    return LossCurve(tuple(order), (0.0, *accumulate(max(0.0, per_unit[u]) for u in order)))


class Scorer(Protocol):
    """Brings loss curves for the network that keeps the given units of every group."""

    def curves(self, kept: Mapping[str, Sequence[int]]) -> Mapping[str, LossCurve]: ...


@dataclass(frozen=True)
class FixedScores:
    """A `Scorer` whose scores never change: one pass over the unpruned network."""

    groups: Sequence[ChannelGroup]
    scores: Mapping[str, Tensor]

    def curves(self, kept: Mapping[str, Sequence[int]]) -> Mapping[str, LossCurve]:
        return {g.name: first_order_curve(g, self.scores[g.name], kept[g.name]) for g in self.groups}


@dataclass(frozen=True)
class SearchLimits:
    """What the search may do.

    Attributes:
        floor: fraction of every group's channels that stay, whatever the budget (at least one unit).
        align: widths are multiples of this wherever a cost model does not say better.
        rescore_every: ask the scorer again when this fraction of the first violated cost has gone; 0: never.
    """

    floor: float = 0.1
    align: int = 1
    rescore_every: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1 or self.align < 1 or not 0 <= self.rescore_every <= 1:
            raise BudgetError(f"expected floor and rescore_every in [0, 1] and align of 1 or more, got {self}")


def greedy_search(
    trace: NetworkTrace,
    scorer: Scorer,
    costs: Sequence[CostModel],
    budgets: Sequence[Budget],
    limits: SearchLimits | None = None,
) -> PruningPlan:
    """The plan whose predicted costs all lie at or under their budgets, with little label information lost.

    Args:
        trace: groups of the network; the ones with a note keep all channels.
        scorer: loss curves, `FixedScores` for one-shot DI.
        costs: cost models, one at least for every budget; all of them are recorded in the plan.
        budgets: limits, each on one of the costs.

    Raises:
        BudgetError: no budget, or one on a cost that no model knows.
        InfeasibleBudget: even the narrowest structure is over a budget; the message names its cost.
        ModelError: no group can be pruned.
    """
    if not trace.prunable:
        notes = "; ".join(f"{g.name}: {g.note}" for g in trace.groups[:3]) or "it has no convolution or linear layer"
        raise ModelError(f"expected a model with channels that can be removed, found none ({notes})")
    state = _State(trace, scorer, costs, _limits_of(costs, budgets), limits or SearchLimits())
    path = [state.point()]
    while state.violated():
        move = state.best_move()
        if move is None:
            raise _infeasible(state, budgets)
        state.take(*move)
        path.append(state.point())
    state.give_back()
    path.append(state.point())
    return state.plan(path)


def _limits_of(costs: Sequence[CostModel], budgets: Sequence[Budget]) -> list[tuple[CostModel, float]]:
    models = {model.name: model for model in costs}
    if not budgets:
        raise BudgetError("expected a budget such as macs=0.5, got none")
    unknown = [b.cost for b in budgets if b.cost not in models]
    if unknown:
        hint = "; give a latency table" if unknown[0] == "latency_ms" else ""
        raise BudgetError(f"expected a budget on one of {', '.join(models)}, got one on {unknown[0]}{hint}")
    return [(models[b.cost], b.absolute(models[b.cost])) for b in budgets]


def _infeasible(state: _State, budgets: Sequence[Budget]) -> InfeasibleBudget:
    reached = ", ".join(f"{m.name} {state.now[m.name]:.6g} (asked {limit:.6g})" for m, limit in state.limits)
    tightest = min(state.widths, key=lambda n: state.widths[n])
    return InfeasibleBudget(
        f"no structure within reach meets {' and '.join(map(str, budgets))}: the cheapest one found has {reached}, "
        f"with every group at its floor (narrowest: {tightest} with {state.widths[tightest]} channels); "
        f"relax the budget or lower the floor of {state.options.floor:g}"
    )


def _exceeds(model: CostModel, limit: float, estimate: float, widths: Mapping[str, int]) -> bool:
    """Whether a cost is over its limit; sums of changes carry rounding, so near the limit it is computed afresh."""
    return (estimate if abs(estimate - limit) > 1e-9 * limit else model.cost(widths)) > limit


def _guide(model: CostModel) -> CostModel:
    """The cost that moves are judged by: a model's smooth stand-in if it offers one."""
    return getattr(model, "guide", model)


@dataclass
class _State:
    """The structure on its way down."""

    trace: NetworkTrace
    scorer: Scorer
    costs: Sequence[CostModel]
    limits: list[tuple[CostModel, float]]
    options: SearchLimits
    widths: dict[str, int] = field(init=False)
    now: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = {g.name: g for g in self.trace.prunable}
        self.widths = self.trace.base_widths
        self.now = {model.name: model.base for model in self.costs}
        self.kept: dict[str, list[int]] = {n: list(range(g.units)) for n, g in self.groups.items()}
        self.allowed = {n: self._allowed_widths(g) for n, g in self.groups.items()}
        self.curves = dict(self.scorer.curves(self.kept))
        self.gone = dict.fromkeys(self.groups, 0)
        self.loss = 0.0
        self._moves: dict[str, tuple[float, int] | None] = {}
        self._violated: frozenset[str] = frozenset()
        self._scored_at = self._pressure()

    def _allowed_widths(self, group: ChannelGroup) -> list[int]:
        """Ascending widths the search may use: above the floor, on the costs' own grids, the unpruned one included."""
        floor = max(group.blocks, int(self.options.floor * group.channels + 0.999999))
        step = group.blocks
        while step % self.options.align and step < group.channels:
            step += group.blocks
        coarse = max(1, group.channels // step // _LEVELS) * step
        widths = {w for w in range(group.channels, 0, -coarse) if w >= floor} | {group.channels}
        if self.options.align > 1:
            widths = {w for w in range(step, group.channels, step) if w >= floor} | {group.channels}
        for model in self.costs:
            grid = getattr(model, "allowed_widths", lambda _: None)(group.name)
            if grid is not None:
                widths = {w for w in grid if w >= floor and w % group.blocks == 0} | {group.channels}
        return sorted(widths)

    def violated(self) -> list[tuple[CostModel, float]]:
        return [(m, limit) for m, limit in self.limits if _exceeds(m, limit, self.now[m.name], self.widths)]

    def _pressure(self) -> float:
        return max((self.now[m.name] / m.base for m, _ in self.limits if m.base), default=0.0)

    def best_move(self) -> tuple[str, int] | None:
        """(group, new width) with the least loss per cost freed; None if nothing frees anything."""
        violated = self.violated()
        names = frozenset(m.name for m, _ in violated)
        if names != self._violated:
            self._moves, self._violated = {}, names
        for name in self.groups:
            if name not in self._moves:
                self._moves[name] = self._best_width(name, violated)
        ranked = [(move[0], name, move[1]) for name, move in self._moves.items() if move is not None]
        _, name, width = min(ranked or self._sidesteps(violated), default=(0.0, "", 0))
        return (name, width) if name else None

    def _sidesteps(self, violated: Sequence[tuple[CostModel, float]]) -> Iterator[tuple[float, str, int]]:
        """(loss, group, next width) of moves that free nothing by themselves and cost nothing either.

        Where layers tie for a maximum only several groups together lower it. What was given up in vain on the way is
        given back in the end.
        """
        for name, here in self.widths.items():
            below = bisect_left(self.allowed[name], here) - 1
            if below >= 0:
                width = self.allowed[name][below]
                if all(m.change(self.widths, name, width) <= 1e-12 * m.base for m, _ in violated):
                    yield self._loss_of(name, width), name, width

    def _best_width(self, name: str, violated: Sequence[tuple[CostModel, float]]) -> tuple[float, int] | None:
        allowed, here = self.allowed[name], self.widths[name]
        below = allowed[: bisect_left(allowed, here)][::-1]
        # Near widths one by one, far ones ever more sparsely: far ones only serve to cross plateaus.
        ahead = [*below[:_LOOK_AHEAD], *below[_LOOK_AHEAD :: max(1, len(below) // _LOOK_AHEAD)]]
        best: tuple[float, int] | None = None
        for width in ahead:
            # Costs relative to the unpruned network, so that milliseconds and MACs weigh alike.
            freed = sum(-_guide(m).change(self.widths, name, width) / m.base for m, _ in violated)
            if freed > 1e-12:
                ratio = self._loss_of(name, width) / freed
                if best is None or ratio < best[0]:
                    best = (ratio, width)
        return best

    def _loss_of(self, name: str, width: int) -> float:
        curve, gone = self.curves[name], self.gone[name]
        more = (self.widths[name] - width) // self.groups[name].blocks
        return curve.losses[gone + more] - curve.losses[gone]

    def take(self, name: str, width: int) -> None:
        self.loss += self._loss_of(name, width)
        self._set(name, width)
        if self.options.rescore_every and self._scored_at - self._pressure() > self.options.rescore_every:
            self._rescore()

    def _set(self, name: str, width: int) -> None:
        more = (self.widths[name] - width) // self.groups[name].blocks
        for model in self.costs:
            self.now[model.name] += model.change(self.widths, name, width)
        self.widths[name] = width
        self.gone[name] += more
        leave = set(self.curves[name].order[: self.gone[name]])
        self.kept[name] = sorted(set(self.curves[name].order) - leave)
        self._forget_moves(name)

    def _forget_moves(self, name: str) -> None:
        """Moves of the groups whose costs depend on this one's width are stale."""
        neighbours: set[str] | None = {name}
        for model in self.costs:
            touched = getattr(_guide(model), "neighbours", lambda _: None)(name)
            if touched is None:
                neighbours = None
                break
            neighbours |= touched
        if neighbours is None:
            self._moves = {}
        else:
            for stale in neighbours:
                self._moves.pop(stale, None)

    def _rescore(self) -> None:
        self.curves = dict(self.scorer.curves(self.kept))
        self.gone = dict.fromkeys(self.groups, 0)
        self._moves, self._scored_at = {}, self._pressure()

    def give_back(self) -> None:
        """Widen groups again, the dearest channels first, while every budget still holds."""
        blocked: set[str] = set()
        while True:
            gains = {n: self._gain(n) for n in self.groups if n not in blocked and self.gone[n] > 0}
            if not gains:
                return
            name = max(gains, key=lambda n: gains[n][0])
            width = gains[name][1]
            after = {m.name: self.now[m.name] + m.change(self.widths, name, width) for m, _ in self.limits}
            wider = {**self.widths, name: width}
            if width == self.widths[name] or any(_exceeds(m, x, after[m.name], wider) for m, x in self.limits):
                blocked.add(name)
                continue
            self.loss += self._loss_of(name, width)
            self._set(name, width)

    def _gain(self, name: str) -> tuple[float, int]:
        """(loss undone per channel, next wider width)."""
        allowed, here = self.allowed[name], self.widths[name]
        wider = allowed[min(bisect_left(allowed, here) + 1, len(allowed) - 1)]
        reach = here + self.gone[name] * self.groups[name].blocks
        if wider == here or wider > reach:
            return (-1.0, here)
        return (-self._loss_of(name, wider) / (wider - here), wider)

    def point(self) -> PathPoint:
        return PathPoint(self.loss, dict(self.now))

    def plan(self, path: Sequence[PathPoint]) -> PruningPlan:
        kept = {
            n: tuple(sorted(u + b * g.units for u in self.kept[n] for b in range(g.blocks)))
            for n, g in self.groups.items()
        }
        # Costs once more from scratch: sums of changes carry rounding.
        costs = {m.name: PlannedCost(m.base, m.cost(self.widths)) for m in self.costs}
        thin = max(1, len(path) // 100)
        shown = (*path[:-1:thin], path[-1])
        return PruningPlan(kept, {n: g.channels for n, g in self.groups.items()}, costs, self.trace.inputs, shown)
