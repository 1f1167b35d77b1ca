"""Structures corrected by what cut networks really lose.

DI tells one channel of a layer from another, and says in one unit, label variance, what every layer gives up. How much
of that a refit mends differs from layer to layer and from one set of channels to another, and no score of the unpruned
network knows it. It can be measured: cut, refit, read the loss on images that were set aside.

First each of the orders in which channels may leave is tried for the whole network. Then come rounds of two halves. One
lets the channels of one group after the other leave in another order, and measures;
all changes that helped are then tried together. The other widens one group after the other by about a quarter, all
giving way in proportion so that the budgets hold: the differences say which widths to raise and which to lower, and
ever longer steps that way follow while they help. The best of all that was tried is where either half begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import exp, inf, isfinite
from statistics import fmean, pstdev

from ..errors import InfeasibleBudget
from ..plan import PruningPlan

#: By how much a group is widened; by more where its grid of widths is so coarse that it would not change.
_WIDER = (1.25, 1.5, 2.0, 3.0)
_STEPS = (0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Wish:
    """What a structure is to be like.

    Attributes:
        profile: group name -> how wide, in proportion only.
        orders: group name -> in which of the orders, by number, its channels leave.
    """

    profile: Mapping[str, float]
    orders: Mapping[str, int]


def measured_plan(
    start: PruningPlan,
    plan_for: Callable[[Wish], PruningPlan],
    loss_of: Callable[[PruningPlan], float],
    *,
    orders: int,
    rounds: int,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[PruningPlan, Wish]:
    """The plan of the smallest measured loss among those that were tried, `start` among them, and its proportions.

    Args:
        start: its channels have left in order 0.
        plan_for: the plan for a wish that meets the budgets; proportions that cannot meet them raise InfeasibleBudget
            and are passed over.
        loss_of: what a plan's network loses, measured; not finite where the network is of no use.
        orders: how many there are to choose from.
        rounds: at most. Each measures `orders` times a group and a few times more, less what was met before; one that
            finds nothing better is the last.
        tell: called with one line a round.
    """
    tried = _Tried(plan_for, loss_of)
    widths = {name: float(width) for name, width in start.widths.items()}
    first = tried.measure(start, Wish(widths, dict.fromkeys(widths, 0)))
    for order in range(1, orders):
        tried.loss(Wish(widths, dict.fromkeys(widths, order)))
    for turn in range(1, rounds + 1):
        before = tried.best_loss
        _better_orders(tried, orders)
        _better_widths(tried)
        tell(f"structures measured, round {turn} of {rounds}: loss {tried.best_loss:.4f}, by DI alone {first:.4f}")
        if tried.best_loss >= before:
            break
    return tried.best, tried.wish


@dataclass
class _Tried:
    """The plans that were measured, each once, and the best of them with the wish that led to it."""

    plan_for: Callable[[Wish], PruningPlan]
    loss_of: Callable[[PruningPlan], float]
    best: PruningPlan = field(init=False)
    wish: Wish = field(init=False)
    best_loss: float = inf
    _losses: dict[tuple[tuple[str, tuple[int, ...]], ...], float] = field(default_factory=dict)

    def loss(self, wish: Wish) -> float:
        try:
            return self.measure(self.plan_for(wish), wish)
        except InfeasibleBudget:
            return inf

    def width(self, wish: Wish, name: str) -> int:
        """A group's width by a wish; 0 where it cannot be met."""
        try:
            return self.plan_for(wish).widths[name]
        except InfeasibleBudget:
            return 0

    def measure(self, plan: PruningPlan, wish: Wish) -> float:
        key = tuple(sorted(plan.kept.items()))
        if key not in self._losses:
            loss = self.loss_of(plan)
            self._losses[key] = loss if isfinite(loss) else inf
            if self._losses[key] < self.best_loss or len(self._losses) == 1:
                self.best, self.best_loss = plan, self._losses[key]
                self.wish = replace(wish, profile={name: float(width) for name, width in plan.widths.items()})
        return self._losses[key]


def _better_orders(tried: _Tried, orders: int) -> None:
    """Another order for each group alone, then everything that helped together."""
    wish, before, helped = tried.wish, tried.best_loss, dict(tried.wish.orders)
    for name, present in wish.orders.items():
        losses = {order: tried.loss(replace(wish, orders={**wish.orders, name: order})) for order in range(orders)}
        best = min(losses, key=lambda order: losses[order])
        helped[name] = best if losses[best] < before else present
    tried.loss(replace(wish, orders=helped))


def _better_widths(tried: _Tried) -> None:
    """Steps towards the widths that helped and away from those that did not."""
    wish, before = tried.wish, tried.best_loss
    centre = wish.profile
    rises = {name: tried.loss(_wider(tried, wish, name)) - before for name in centre}
    finite = [rise for rise in rises.values() if isfinite(rise)]
    if len(finite) < 2 or not pstdev(finite):
        return
    mean, spread, worst = fmean(finite), pstdev(finite), max(finite)
    slope = {name: (min(rise, worst) - mean) / spread for name, rise in rises.items()}
    last = inf
    for step in _STEPS:
        loss = tried.loss(replace(wish, profile={n: width * exp(-step * slope[n]) for n, width in centre.items()}))
        if loss > last:
            break
        last = loss


def _wider(tried: _Tried, wish: Wish, name: str) -> Wish:
    """The wish with one group a step wider, if it can be."""
    width = wish.profile[name]
    wishes = [replace(wish, profile={**wish.profile, name: max(width * factor, width + 1)}) for factor in _WIDER]
    return next((wider for wider in wishes if tried.width(wider, name) > width), wishes[0])
