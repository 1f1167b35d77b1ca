"""Greedy selection: give up the channels with the least discriminant information per unit of cost, until budgets hold.

No model and no data here: a `LossCurve` says in which order a group's units leave and how much information is lost
with each, cost models say what that frees, and a `Scorer` may bring fresh curves on the way.

Each step looks, in every group, over the widths that may come next and takes the one with the least loss per cost
freed, where cost means the budgets still violated, each as a share of what it is over. Looking over many widths at
once is what carries the search across plateaus and bumps of a measured latency: a step that frees nothing is never
taken, one that ends beyond the plateau is. Where no step frees anything, wider groups may still help (`restoration`).
When all budgets hold, what was given up in vain is undone (`refinement`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..costs import Budget, CostModel
from ..errors import InfeasibleBudget
from ..network import NetworkTrace
from ..plan import PruningPlan
from .curves import Scorer
from .problem import Limit, SearchLimits, check_prunable, limits_of
from .refinement import refine
from .restoration import restore
from .structure import Structure


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
        InfeasibleBudget: every structure found is over a budget; the message names the costs of the cheapest.
        ModelError: no group can be pruned.
    """
    check_prunable(trace)
    structure = Structure(trace, scorer, costs, limits_of(costs, budgets), limits or SearchLimits(), start)
    path = [*(() if start is None else start.path), structure.point()]
    descent = _Descent(structure)
    while structure.violated():
        move = descent.best_move()
        if move is not None:
            descent.take(*move)
        elif not restore(structure):
            raise _infeasible(structure, budgets)
        path.append(structure.point())
    refine(structure)
    path.append(structure.point())
    return structure.plan(path)


@dataclass(frozen=True)
class GreedySearch:
    """`greedy_search` as an object, to be handed to whatever takes a search."""

    __call__ = staticmethod(greedy_search)


def _infeasible(structure: Structure, budgets: Sequence[Budget]) -> InfeasibleBudget:
    reached = ", ".join(f"{m.name} {structure.now[m.name]:.6g} (asked {limit:.6g})" for m, limit in structure.limits)
    tightest = min(structure.widths, key=lambda n: structure.widths[n])
    floor, align = structure.options.floor, structure.options.align
    coarse = f" or the alignment to {align}" if align > 1 else ""
    return InfeasibleBudget(
        f"no structure within reach meets {' and '.join(map(str, budgets))}: the cheapest one found has {reached} "
        f"(narrowest group: {tightest} with {structure.widths[tightest]} channels); "
        f"relax the budget or lower the floor of {floor:g}{coarse}"
    )


def _guide(model: CostModel) -> CostModel:
    """The cost that moves are judged by: a model's smooth stand-in if it offers one."""
    return getattr(model, "guide", model)


class _Descent:
    """The way down: every group's best move, remembered until something changes what it is worth."""

    def __init__(self, structure: Structure) -> None:
        self._structure = structure
        self._moves: dict[str, tuple[float, int] | None] = {}
        self._violated: frozenset[str] = frozenset()
        self._scored_at = self._pressure()

    def _pressure(self) -> float:
        now = self._structure.now
        return max((now[m.name] / m.base for m, _ in self._structure.limits if m.base), default=0.0)

    def best_move(self) -> tuple[str, int] | None:
        """(group, new width) with the least loss per cost freed; None if nothing frees anything."""
        violated = self._structure.violated()
        names = frozenset(m.name for m, _ in violated)
        if names != self._violated:
            self._moves, self._violated = {}, names
        for name in self._structure.groups:
            if name not in self._moves:
                self._moves[name] = self._best_width(name, violated)
        ranked = [(move[0], name, move[1]) for name, move in self._moves.items() if move is not None]
        _, name, width = min(ranked or self._sidesteps(violated), default=(0.0, "", 0))
        return (name, width) if name else None

    def _sidesteps(self, violated: Sequence[Limit]) -> Iterator[tuple[float, str, int]]:
        """(loss, group, next width) of moves that free nothing by themselves and cost nothing either.

        Where layers tie for a maximum only several groups together lower it. What was given up in vain on the way is
        given back in the end.
        """
        structure = self._structure
        for name in structure.groups:
            for width in structure.narrower(name)[:1]:
                if all(m.change(structure.widths, name, width) <= 1e-12 * m.base for m, _ in violated):
                    yield structure.loss_of(name, width), name, width

    def _best_width(self, name: str, violated: Sequence[Limit]) -> tuple[float, int] | None:
        structure = self._structure
        best: tuple[float, int] | None = None
        for width in structure.near_and_far(name):
            # Costs relative to the unpruned network, so that milliseconds and MACs weigh alike.
            freed = sum(-_guide(m).change(structure.widths, name, width) / m.base for m, _ in violated)
            if freed > 1e-12:
                ratio = structure.loss_of(name, width) / freed
                if best is None or ratio < best[0]:
                    best = (ratio, width)
        return best

    def take(self, name: str, width: int) -> None:
        structure = self._structure
        structure.set_width(name, width)
        self._forget_moves(name)
        if structure.options.rescore_every and self._scored_at - self._pressure() > structure.options.rescore_every:
            structure.score()
            self._moves, self._scored_at = {}, self._pressure()

    def _forget_moves(self, name: str) -> None:
        """Moves of the groups whose costs depend on this one's width are stale."""
        stale = {name}
        for model in self._structure.costs:
            touched = getattr(_guide(model), "neighbours", lambda _: None)(name)
            if touched is None:
                self._moves = {}
                return
            stale |= touched
        for each in stale:
            self._moves.pop(each, None)
