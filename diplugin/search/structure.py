"""A structure on its way to a plan: widths, what they cost and lose, and what may be done to one of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..costs import CostModel
from ..network import NetworkTrace
from ..plan import PathPoint, PlannedCost, PruningPlan
from .curves import Scorer
from .problem import Limit, SearchLimits, allowed_widths, exceeds, hold_after

#: Widths looked at on each side: so many next ones, and about as many further down.
LOOK_AHEAD = 12


@dataclass
class Structure:
    """The widths of all groups, begun unpruned or at an earlier plan, and their costs and loss.

    Attributes:
        widths: group -> channels that it keeps.
        now: cost -> what the widths cost; sums of changes, which carry rounding.
        loss: of everything that was removed.
        curves: of the units that were there when the scorer was last asked.
        gone: group -> units removed since then.
    """

    trace: NetworkTrace
    scorer: Scorer
    costs: Sequence[CostModel]
    limits: list[Limit]
    options: SearchLimits
    start: PruningPlan | None = None
    widths: dict[str, int] = field(init=False)
    now: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.groups = {g.name: g for g in self.trace.prunable}
        left = {n: tuple(range(g.channels)) for n, g in self.groups.items()} if self.start is None else self.start.kept
        self.widths = {n: len(left[n]) for n in self.groups}
        self.now = {m.name: m.base if self.start is None else m.cost(self.widths) for m in self.costs}
        self._kept: dict[str, list[int]] = {n: [c for c in left[n] if c < g.units] for n, g in self.groups.items()}
        self._allowed = {n: allowed_widths(g, self.costs, self.options) for n, g in self.groups.items()}
        self.loss = self.start.path[-1].loss if self.start is not None and self.start.path else 0.0
        self.score()

    def score(self) -> None:
        """Ask the scorer about what is left; what is gone by then stays gone."""
        self.curves = dict(self.scorer.curves(self._kept))
        self.gone = dict.fromkeys(self.groups, 0)

    def violated(self) -> list[Limit]:
        return [(m, limit) for m, limit in self.limits if exceeds(m, limit, self.now[m.name], self.widths)]

    def narrower(self, name: str) -> list[int]:
        """Allowed widths below a group's present one, descending."""
        allowed = self._allowed[name]
        return allowed[: bisect_left(allowed, self.widths[name])][::-1]

    def near_and_far(self, name: str) -> list[int]:
        """Narrower widths, near ones one by one, far ones ever more sparsely: those only serve to cross plateaus."""
        return _near_and_far(self.narrower(name))

    def wider(self, name: str) -> list[int]:
        """Allowed widths above the present one, ascending, up to what this search has removed."""
        allowed, here = self._allowed[name], self.widths[name]
        reach = here + self.gone[name] * self.groups[name].blocks
        return [w for w in allowed[bisect_left(allowed, here) :] if here < w <= reach]

    def wider_near_and_far(self, name: str) -> list[int]:
        """Wider widths, thinned as narrower ones are."""
        return _near_and_far(self.wider(name))

    def loss_of(self, name: str, width: int) -> float:
        """What is lost when a group goes to a narrower width; negative: undone at a wider one."""
        losses, gone = self.curves[name].losses, self.gone[name]
        return losses[gone + self._units(name, width)] - losses[gone]

    def _units(self, name: str, width: int) -> int:
        """How many units a group has fewer at this width."""
        return (self.widths[name] - width) // self.groups[name].blocks

    def fits(self, name: str, width: int) -> bool:
        """Whether every budget holds with the group at this width."""
        return hold_after(self.limits, self.widths, self.now, name, width)

    def set_width(self, name: str, width: int) -> None:
        self.loss += self.loss_of(name, width)
        for model in self.costs:
            self.now[model.name] += model.change(self.widths, name, width)
        self.gone[name] += self._units(name, width)
        self.widths[name] = width
        order = self.curves[name].order
        self._kept[name] = sorted(order[self.gone[name] :])

    def point(self) -> PathPoint:
        return PathPoint(self.loss, dict(self.now))

    def plan(self, path: Sequence[PathPoint]) -> PruningPlan:
        kept = {
            n: tuple(sorted(u + b * g.units for u in self._kept[n] for b in range(g.blocks)))
            for n, g in self.groups.items()
        }
        # Costs once more from scratch: sums of changes carry rounding.
        costs = {m.name: PlannedCost(m.base, m.cost(self.widths)) for m in self.costs}
        thin = max(1, len(path) // 100)
        shown = (*path[:-1:thin], path[-1])
        return PruningPlan(kept, {n: g.channels for n, g in self.groups.items()}, costs, self.trace.inputs, shown)


def _near_and_far(widths: Sequence[int]) -> list[int]:
    return [*widths[:LOOK_AHEAD], *widths[LOOK_AHEAD :: max(1, len(widths) // LOOK_AHEAD)]]
