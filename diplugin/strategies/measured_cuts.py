"""Measured cuts: where DI's plan is the beginning, and the loss of refitted trial cuts has the last word.

Starts from the plan that DI makes alone and descends along what cut networks really lose (see `search/measured.py`), in
how wide the groups are and in which order their channels leave: by the ranking of one shot, by DI loss alone, or by
the distances of their filters. A trial costs seconds for a small network, and a round makes a few for every group. What
that buys shows after recovery (see the study under benchmarks/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..costs import Budget, CostModel
from ..errors import UserError
from ..filters import filter_distances
from ..network import NetworkTrace
from ..plan import PathPoint, PruningPlan
from ..ranking import ByLoss, hand_out
from ..recovery import Reconstruct
from ..run_folder import TRIALS
from ..scoring import GroupScores
from ..search import Wish, first_order_curve, measured_plan, plan_at, widest
from ..team import current_team
from .cut_loss import CutLoss, Remembered
from .job import Job, Shrunk
from .one_shot import OneShot


@dataclass(frozen=True)
class MeasuredCuts:
    """A plan by DI, corrected by the measured loss of refitted cuts.

    Attributes:
        rounds: of the descent, at most.
        disguise: whether images [N, C, H, W] are judged turned, scaled and lit differently, as the network has not seen
            them; False where that would change what they show (spectrograms, say). Other inputs stay as they are.

    Raises:
        UserError: fewer than one round.
    """

    rounds: int = 4
    disguise: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.rounds, int) or self.rounds < 1:
            raise UserError(f"expected rounds of 1 or more, got {self.rounds!r:.80}")

    def record(self) -> dict[str, Any]:
        """The settings as JSON."""
        return {"kind": type(self).__name__, **asdict(self)}

    def shrink(self, once: OneShot, job: Job, scores: GroupScores) -> Shrunk:
        """The whole strategy: one plan for all budgets, and the network cut by it.

        Args:
            once: how the network is scored, searched and cut.
            scores: of the unpruned network.

        Raises:
            InfeasibleBudget: no structure within reach meets the budgets.
        """
        loss_of = self.cut_loss(once, job.model, job.trace, job.split.scoring, job.split.holdout)
        remembered = Remembered(loss_of, job.folder.stage(TRIALS))
        descent = self.descent(once, job.model, job.trace, scores, job.costs, remembered, job.tell)
        return once.carry_out(job, job.plan(descent.plan))

    def cut_loss(
        self, once: OneShot, model: nn.Module, trace: NetworkTrace, images: Iterable[Any], judged: Iterable[Any]
    ) -> CutLoss:
        """What trials are judged by: the refit of one shot, or what it has instead."""
        refits = [repair for repair in once.repairs if isinstance(repair, Reconstruct)] or once.repairs
        return CutLoss(model, trace, images, judged, once.get_labels, once.forward, refits[0], self.disguise)

    def descent(
        self, once: OneShot, model: nn.Module, trace: NetworkTrace, scores: GroupScores, costs: Sequence[CostModel],
        loss_of: Callable[[PruningPlan], float], tell: Callable[[str], None] = lambda _: None,
    ) -> Descent:  # fmt: skip
        """The search for a network's plan, ready to be asked."""
        orders = [once.losses(trace, scores), replace(once, ranking=ByLoss()).losses(trace, scores),
                  _by_distance(model, trace, scores)]  # fmt: skip
        # Machines may round differently, and a tie would tell their plans apart.
        current_team().follow_first([losses for order in orders for losses in order.values()])
        return Descent(self.rounds, once, trace, orders, costs, loss_of, tell)


def _by_distance(model: nn.Module, trace: NetworkTrace, scores: GroupScores) -> dict[str, Tensor]:
    """DI's losses, handed out in the order of the filters' distances where there are filters."""
    found, layers = {}, dict(model.named_modules())
    for group in trace.prunable:
        losses, distances = scores.scores[group.name], filter_distances(layers, group)
        found[group.name] = hand_out(losses, losses if distances is None else distances, group.blocks)
    return found


@dataclass
class Descent:
    """The search for the plan of one network under one set of budgets.

    Attributes:
        rounds: at most.
        once: makes the plan to start from.
        orders: ways in which channels may leave; each is group name -> [channels], DI's losses handed out in it. The
            first one is that of the plan to start from.
        costs: recorded in the plan, one at least for every budget.
        loss_of: what a plan's network loses, measured.
        tell: called with one line a round.
        start: the plan by DI alone, once it was made.
        found: the proportions that the descent has ended with.
    """

    rounds: int
    once: OneShot
    trace: NetworkTrace
    orders: Sequence[Mapping[str, Tensor]]
    costs: Sequence[CostModel]
    loss_of: Callable[[PruningPlan], float]
    tell: Callable[[str], None] = lambda _: None
    start: PruningPlan | None = field(default=None, init=False)
    found: Wish | None = field(default=None, init=False)

    def plan(self, budgets: Sequence[Budget]) -> PruningPlan:
        """The plan for these budgets. Asked again (by the clock, for less or more), the proportions stay as found.

        Raises:
            InfeasibleBudget: no structure within reach meets the budgets.
        """

        def plan_for(wish: Wish) -> PruningPlan:
            losses = {name: self.orders[i][name] for name, i in wish.orders.items()}
            widths = widest(self.trace, self.costs, budgets, self.once.limits, wish.profile)
            return plan_at(self.trace, losses, self.costs, widths)

        if self.start is not None and self.found is not None:
            return self._with_path(plan_for(self.found), self.start)
        self.start = self.once.plan(self.trace, self.orders[0], self.costs, budgets)
        plan, self.found = measured_plan(self.start, plan_for, self.loss_of, orders=len(self.orders),
                                         rounds=self.rounds, tell=self.tell)  # fmt: skip
        return plan if plan is self.start else self._with_path(plan, self.start)

    def _with_path(self, plan: PruningPlan, start: PruningPlan) -> PruningPlan:
        """The plan with the path of the search that it began with, and where it went from there."""
        curves = {g.name: first_order_curve(g, self.orders[0][g.name]) for g in self.trace.prunable}
        gone = {g.name: (g.channels - plan.widths[g.name]) // g.blocks for g in self.trace.prunable}
        lost = sum(curve.losses[gone[name]] for name, curve in curves.items())
        there = PathPoint(lost, {name: cost.predicted for name, cost in plan.costs.items()})
        return replace(plan, path=(*start.path, there), found_by="corrected by the measured loss of refitted cuts")
