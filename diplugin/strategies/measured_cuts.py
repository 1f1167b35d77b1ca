"""Measured cuts: where DI's plan is the beginning, and the loss of refitted trial cuts has the last word.

Starts from the plan that DI makes alone and descends along what cut networks really lose (see `search/measured.py`), in
how wide the groups are and in which order their channels leave: by the ranking of one shot, by DI loss alone, or by
the distances of their filters. A trial costs seconds for a small network, and a round makes a few for every group. What
that buys shows after recovery (see the study under benchmarks/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from ..costs import Budget, CostModel
from ..errors import UserError
from ..filter_distances import filter_distances
from ..plan import PathPoint, PruningPlan
from ..ranking import ByLoss, hand_out
from ..scoring import GroupScores
from ..search import Wish, first_order_curve, measured_plan, plan_at, widest
from .cut_loss import CutLoss
from .job import Job, Shrunk
from .one_shot import OneShot


@dataclass(frozen=True)
class MeasuredCuts:
    """A plan by DI, corrected by the measured loss of refitted cuts.

    Attributes:
        rounds: of the descent, at most.

    Raises:
        UserError: fewer than one round.
    """

    rounds: int = 4

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
        loss_of = CutLoss(job.model, job.trace, job.split.scoring, job.split.holdout, once.get_labels, once.forward)
        return once.carry_out(job, job.plan(self.descent(once, scores, job.costs, loss_of, job.tell).plan))

    def descent(
        self, once: OneShot, scores: GroupScores, costs: Sequence[CostModel], loss_of: CutLoss,
        tell: Callable[[str], None] = lambda _: None,
    ) -> Descent:  # fmt: skip
        """The search for the plan, ready to be asked."""
        orders = (replace(once, ranking=ranking) for ranking in (once.ranking, ByLoss()))
        losses = [*(by.losses(loss_of.trace, scores) for by in orders), _by_distance(loss_of, scores)]
        return Descent(self.rounds, once, losses, costs, loss_of, tell)


def _by_distance(loss_of: CutLoss, scores: GroupScores) -> dict[str, Tensor]:
    """DI's losses, handed out in the order of the filters' distances."""
    return {g.name: hand_out(scores.scores[g.name], filter_distances(loss_of.model, g), g.blocks)
            for g in loss_of.trace.prunable}  # fmt: skip


@dataclass
class Descent:
    """The search for one network's plan, for whatever budgets are asked for.

    Attributes:
        once: makes the plan to start from.
        losses: for every order in which channels may leave, group name -> [channels], DI's losses handed out in it; the
            first one is that of the plan to start from.
        loss_of: what a plan's network loses, measured.
    """

    rounds: int
    once: OneShot
    losses: Sequence[Mapping[str, Tensor]]
    costs: Sequence[CostModel]
    loss_of: CutLoss
    tell: Callable[[str], None] = lambda _: None
    found: Wish | None = None

    def plan(self, budgets: Sequence[Budget]) -> PruningPlan:
        """The plan for these budgets; asked again (by the clock, for a little less), in the proportions found before.

        Raises:
            InfeasibleBudget: no structure within reach meets the budgets.
        """

        def plan_for(wish: Wish) -> PruningPlan:
            trace, losses = self.loss_of.trace, {name: self.losses[i][name] for name, i in wish.orders.items()}
            return plan_at(
                trace, losses, self.costs, widest(trace, self.costs, budgets, self.once.limits, wish.profile)
            )

        if self.found is not None:
            return plan_for(self.found)
        start = self.once.plan(self.loss_of.trace, self.losses[0], self.costs, budgets)
        plan, self.found = measured_plan(start, plan_for, self.loss_of, orders=len(self.losses), rounds=self.rounds,
                                         tell=self.tell)  # fmt: skip
        return plan if plan is start else self._with_path(plan, start)

    def _with_path(self, plan: PruningPlan, start: PruningPlan) -> PruningPlan:
        """The plan with the path of the search that it began with, and where it went from there."""
        curves = {g.name: first_order_curve(g, self.losses[0][g.name]) for g in self.loss_of.trace.prunable}
        gone = {g.name: (g.channels - plan.widths[g.name]) // g.blocks for g in self.loss_of.trace.prunable}
        lost = sum(curve.losses[gone[name]] for name, curve in curves.items())
        there = PathPoint(lost, {name: cost.predicted for name, cost in plan.costs.items()})
        return replace(plan, path=(*start.path, there), found_by="corrected by the measured loss of refitted cuts")
