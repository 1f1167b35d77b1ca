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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..costs import Budget, CostModel
from ..errors import InfeasibleBudget
from ..network import NetworkTrace
from ..plan import PathPoint, PlannedCost, PruningPlan
from .curves import Scorer
from .problem import SearchLimits, allowed_widths, check_prunable, exceeds, limits_of

_LOOK_AHEAD = 12


def greedy_search(
    trace: NetworkTrace,
    scorer: Scorer,
    costs: Sequence[CostModel],
    budgets: Sequence[Budget],
    limits: SearchLimits | None = None,
    *,
    start: PruningPlan | None = None,
) -> PruningPlan:
    """The plan whose predicted costs all lie at or under their budgets, with little label information lost.

    Args:
        trace: groups of the network; the ones with a note keep all channels.
        scorer: loss curves, `FixedScores` for one-shot DI.
        costs: cost models, one at least for every budget; all of them are recorded in the plan.
        budgets: limits, each on one of the costs.
        start: what an earlier plan for this network has left; nothing that it removed comes back.

    Raises:
        BudgetError: no budget, or one on a cost that no model knows.
        InfeasibleBudget: even the narrowest structure is over a budget; the message names its cost.
        ModelError: no group can be pruned.
    """
    check_prunable(trace)
    state = State(trace, scorer, costs, limits_of(costs, budgets), limits or SearchLimits(), start)
    path = [*(() if start is None else start.path), state.point()]
    while state.violated():
        move = state.best_move()
        if move is None:
            raise _infeasible(state, budgets)
        state.take(*move)
        path.append(state.point())
    state.give_back()
    path.append(state.point())
    return state.plan(path)


@dataclass(frozen=True)
class GreedySearch:
    """`greedy_search` as an object, to be handed to whatever takes a search."""

    __call__ = staticmethod(greedy_search)


def _infeasible(state: State, budgets: Sequence[Budget]) -> InfeasibleBudget:
    reached = ", ".join(f"{m.name} {state.now[m.name]:.6g} (asked {limit:.6g})" for m, limit in state.limits)
    tightest = min(state.widths, key=lambda n: state.widths[n])
    return InfeasibleBudget(
        f"no structure within reach meets {' and '.join(map(str, budgets))}: the cheapest one found has {reached}, "
        f"with every group at its floor (narrowest: {tightest} with {state.widths[tightest]} channels); "
        f"relax the budget or lower the floor of {state.options.floor:g}"
    )


def _guide(model: CostModel) -> CostModel:
    """The cost that moves are judged by: a model's smooth stand-in if it offers one."""
    return getattr(model, "guide", model)


@dataclass
class State:
    """The structure on its way down."""

    trace: NetworkTrace
    scorer: Scorer
    costs: Sequence[CostModel]
    limits: list[tuple[CostModel, float]]
    options: SearchLimits
    start: PruningPlan | None = None
    widths: dict[str, int] = field(init=False)
    now: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = {g.name: g for g in self.trace.prunable}
        left = {n: tuple(range(g.channels)) for n, g in self.groups.items()} if self.start is None else self.start.kept
        self.widths = {n: len(left[n]) for n in self.groups}
        self.now = {m.name: m.base if self.start is None else m.cost(self.widths) for m in self.costs}
        self.kept: dict[str, list[int]] = {n: [c for c in left[n] if c < g.units] for n, g in self.groups.items()}
        self.allowed = {n: allowed_widths(g, self.costs, self.options) for n, g in self.groups.items()}
        self.curves = dict(self.scorer.curves(self.kept))
        self.gone = dict.fromkeys(self.groups, 0)
        self.loss = self.start.path[-1].loss if self.start is not None and self.start.path else 0.0
        self._moves: dict[str, tuple[float, int] | None] = {}
        self._violated: frozenset[str] = frozenset()
        self._scored_at = self._pressure()

    def violated(self) -> list[tuple[CostModel, float]]:
        return [(m, limit) for m, limit in self.limits if exceeds(m, limit, self.now[m.name], self.widths)]

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
            gains = {n: self._gain(n, wider[0]) for n in self.groups if n not in blocked and (wider := self._wider(n))}
            if not gains:
                return
            name = max(gains, key=lambda n: gains[n])
            # The next width may be dearer than one beyond it, as right off a multiple of eight.
            width = next((w for w in self._wider(name) if self._fits(name, w)), None)
            if width is None:
                blocked.add(name)
                continue
            self.loss += self._loss_of(name, width)
            self._set(name, width)

    def _wider(self, name: str) -> list[int]:
        """Allowed widths above the present one, up to what this search has removed."""
        allowed, here = self.allowed[name], self.widths[name]
        reach = here + self.gone[name] * self.groups[name].blocks
        return [w for w in allowed[bisect_left(allowed, here) :] if here < w <= reach]

    def _fits(self, name: str, width: int) -> bool:
        """Whether every budget holds with the group at this width."""
        after = {**self.widths, name: width}
        return not any(
            exceeds(m, limit, self.now[m.name] + m.change(self.widths, name, width), after) for m, limit in self.limits
        )

    def _gain(self, name: str, width: int) -> float:
        """Loss undone per channel."""
        return -self._loss_of(name, width) / (width - self.widths[name])

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
