"""Measured widths: DI ranks the channels of every group, the loss of refitted cuts says how many of them stay.

Starts from the plan that DI makes alone and descends along what cut networks really lose (see `search/measured.py`).
A trial costs a cut, a refit on a few images and a look at the holdout: seconds for a small network, dozens of them for
one with dozens of groups. What it buys shows after recovery (see the study under benchmarks/).

The holdout is read in disguise: the network knows it by heart, and memory is not what recovery is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..accuracy import check_fit
from ..costs import Budget, CostModel
from ..disguise import Disguised
from ..errors import UserError
from ..features import Forward, GetLabels, device_of, to_device
from ..modes import evaluating
from ..network import NetworkTrace
from ..plan import PathPoint, PruningPlan
from ..recovery import Cut, Reconstruct, Reconstruction, label_loss
from ..scoring import GroupScores
from ..search import first_order_curve, measured_plan, plan_at, widest
from ..team import current_team
from .job import Job, Shrunk
from .one_shot import OneShot, first_images


@dataclass(frozen=True)
class CutLoss:
    """What a plan's network loses: cut, refitted and judged by its loss on disguised images.

    Attributes:
        model: the unpruned network.
        images: training batches for the refit.
        judged: labelled batches that are not among `images`.
        fitted: training images that a refit sees.
        most: images of `judged` that are read.
    """

    model: nn.Module
    trace: NetworkTrace
    images: Iterable[Any]
    judged: Iterable[Any]
    get_labels: GetLabels
    forward: Forward
    fitted: int = 750
    most: int = 3000

    def __call__(self, plan: PruningPlan) -> float:
        """The mean loss by the labels; of many processes each reads some of the batches, and all get one figure."""
        repair = Reconstruct(Reconstruction(images=self.fitted))
        loader = list(first_images(self.images, self.fitted))
        model = repair.repaired(Cut(self.model, loader, self.trace, plan, self.fitted, self.forward))
        team, sums = current_team(self.judged), torch.zeros(2, dtype=torch.float64)
        with evaluating(model), torch.no_grad(), team.together():
            for turn, batch in enumerate(Disguised(first_images(self.judged, self.most))):
                if team.mine(turn):
                    batch = to_device(batch, device_of(model))
                    labels, logits = self.get_labels(batch), self.forward(model, batch)
                    check_fit(logits, labels)
                    sums += torch.tensor([float(label_loss(logits, labels)) * len(labels), len(labels)])
        team.sum([sums])
        return float(sums[0] / sums[1])


@dataclass(frozen=True)
class MeasuredWidths:
    """Widths by DI, corrected by the measured loss of refitted cuts.

    Attributes:
        rounds: of the descent, at most.
        fitted: training images that the refit of a trial sees.

    Raises:
        UserError: a number below 1.
    """

    rounds: int = 6
    fitted: int = 750

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.fitted < 1:
            raise UserError(f"expected rounds and fitted of 1 or more, got {self}")

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
        loss_of = CutLoss(job.model, job.trace, job.split.scoring, job.split.holdout, once.get_labels, once.forward,
                          self.fitted)  # fmt: skip
        descent = Descent(self, once, once.losses(job.trace, scores), job.costs, loss_of, job.tell)
        return once.carry_out(job, job.plan(descent.plan))


@dataclass
class Descent:
    """The search for one network's widths, once for whatever budgets are asked for.

    Attributes:
        losses: group name -> [channels], what the search by DI takes channels to be worth.
        loss_of: what a plan's network loses, measured.
    """

    settings: MeasuredWidths
    once: OneShot
    losses: Mapping[str, Tensor]
    costs: Sequence[CostModel]
    loss_of: CutLoss
    tell: Callable[[str], None] = lambda _: None
    found: PruningPlan | None = None

    def plan(self, budgets: Sequence[Budget]) -> PruningPlan:
        """The plan for these budgets; asked again (by the clock, for a little less), in the proportions found before.

        Raises:
            InfeasibleBudget: no structure within reach meets the budgets.
        """
        trace, once = self.loss_of.trace, self.once

        def in_proportion(profile: Mapping[str, float]) -> PruningPlan:
            widths = widest(trace, self.costs, budgets, once.limits, profile)
            return plan_at(trace, self.losses, self.costs, widths)

        if self.found is not None:
            return in_proportion(self.found.widths)
        start = once.plan(trace, self.losses, self.costs, budgets)
        self.found = measured_plan(start, in_proportion, self.loss_of, rounds=self.settings.rounds, tell=self.tell)
        return self.found if self.found is start else self._with_path(self.found, start)

    def _with_path(self, plan: PruningPlan, start: PruningPlan) -> PruningPlan:
        """The plan with the path of the search that it began with, and where it went from there."""
        curves = {g.name: first_order_curve(g, self.losses[g.name]) for g in self.loss_of.trace.prunable}
        gone = {g.name: (g.channels - plan.widths[g.name]) // g.blocks for g in self.loss_of.trace.prunable}
        lost = sum(curve.losses[gone[name]] for name, curve in curves.items())
        there = PathPoint(lost, {name: cost.predicted for name, cost in plan.costs.items()})
        return replace(plan, path=(*start.path, there), found_by="widths by the measured loss of refitted cuts")
