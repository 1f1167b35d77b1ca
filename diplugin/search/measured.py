"""Widths corrected by what cut networks really lose.

DI tells one channel of a layer from another, and says in one unit, label variance, what every layer gives up. How much
of that a refit mends differs from layer to layer, and no score of the unpruned network knows it. It can be measured:
cut, refit, read the loss on images that were set aside.

One round widens one group after the other by a quarter, all giving way in proportion so that the budgets hold, and
measures. The differences are the gradient of the measured loss by the logarithms of the widths. Ever longer steps
against it follow while they help, and the best of all that was tried is where the next round begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import exp, inf, isfinite
from statistics import fmean, pstdev

from ..errors import InfeasibleBudget
from ..plan import PruningPlan

#: Group name -> how wide it should be, in proportion only.
Profile = Mapping[str, float]
_WIDER = 1.25
_STEPS = (0.1, 0.2, 0.4, 0.8)


def measured_plan(
    start: PruningPlan,
    plan_for: Callable[[Profile], PruningPlan],
    loss_of: Callable[[PruningPlan], float],
    *,
    rounds: int,
    tell: Callable[[str], None] = lambda _: None,
) -> PruningPlan:
    """The plan of the smallest measured loss among those that were tried, `start` among them.

    Args:
        plan_for: the plan that meets the budgets with widths in these proportions; proportions that cannot meet them
            raise InfeasibleBudget and are passed over.
        loss_of: what a plan's network loses, measured; not finite where the network is of no use.
        rounds: at most. Each measures once a group and two to four times more, less the widths that were met before;
            one that finds nothing better is the last.
        tell: called with one line a round.
    """
    tried = _Tried(plan_for, loss_of)
    first = tried.measure(start)
    for turn in range(1, rounds + 1):
        before, centre = tried.best_loss, {name: float(width) for name, width in tried.best.widths.items()}
        rises = {name: tried.loss({**centre, name: max(width * _WIDER, width + 1)}) - before
                 for name, width in centre.items()}  # fmt: skip
        last = inf
        for profile in _downhill(centre, rises):
            loss = tried.loss(profile)
            if loss > last:
                break
            last = loss
        tell(f"widths measured, round {turn} of {rounds}: loss {tried.best_loss:.4f}, by DI alone {first:.4f}")
        if tried.best_loss >= before:
            break
    return tried.best


def _downhill(centre: Profile, rises: Mapping[str, float]) -> list[Profile]:
    """Profiles that lie against the gradient; none where it says nothing."""
    finite = [rise for rise in rises.values() if isfinite(rise)]
    if len(finite) < 2 or not pstdev(finite):
        return []
    mean, spread, worst = fmean(finite), pstdev(finite), max(finite)
    slope = {name: (min(rise, worst) - mean) / spread for name, rise in rises.items()}
    return [{name: width * exp(-step * slope[name]) for name, width in centre.items()} for step in _STEPS]


@dataclass
class _Tried:
    """The plans that were measured, each once, and the best of them."""

    plan_for: Callable[[Profile], PruningPlan]
    loss_of: Callable[[PruningPlan], float]
    best: PruningPlan = field(init=False)
    best_loss: float = inf
    _losses: dict[tuple[tuple[str, int], ...], float] = field(default_factory=dict)

    def loss(self, profile: Profile) -> float:
        try:
            return self.measure(self.plan_for(profile))
        except InfeasibleBudget:
            return inf

    def measure(self, plan: PruningPlan) -> float:
        key = tuple(sorted(plan.widths.items()))
        if key not in self._losses:
            loss = self.loss_of(plan)
            self._losses[key] = loss if isfinite(loss) else inf
            if self._losses[key] < self.best_loss or len(self._losses) == 1:
                self.best, self.best_loss = plan, self._losses[key]
        return self._losses[key]
