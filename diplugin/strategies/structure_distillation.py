"""Structure distillation: structure and weights settle together, step by step (our reading of the method).

The network is pruned a little, repaired, and taught a little by the unpruned one (its logits, and its penultimate
features inside its discriminant subspace) and pruned on, until the budgets hold. A step's limits come from a schedule.
The last cut is followed by no lesson of its own: that is what `recovery` is for. With one step, what is left is one
shot.

Every step searches in terms of the unpruned network, from what the last step left: plans compose by construction, and
costs and budgets keep one meaning throughout. Channels are worth what they were worth to the unpruned network. Scoring
the network on its way anew is offered and loses: it thins the wide late layers to spare the early ones (see the study
under benchmarks/). A repair refits the cut network to what the network said *just before the cut*, not to the unpruned
one: that one's teaching is in its weights already, and a refit to the unpruned features would undo what the lessons
moved.

A step is a function of two files, the plan and the weights that the step before left, and ends by writing its own two:
a run that was killed goes on with the step, and within its lesson with the epoch, at which it stopped, and ends with
the same plan and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..costs import Budget
from ..errors import UserError
from ..plan import PruningPlan
from ..recovery import EpochReport, FeatureDistillation, FineTuning
from ..run_folder import recorded
from ..scoring import GroupScores
from .job import Job, Shrunk, shares
from .one_shot import OneShot
from .schedules import Geometric, Schedule
from .steps import Standing, Steps


@dataclass(frozen=True)
class StructureDistillation:
    """How a network shrinks in steps, with the unpruned one as its teacher.

    Attributes:
        schedule: how many steps, and how far each one goes.
        lesson: training after every step but the last; None for none.
        rescore: whether each step scores the network anew instead of keeping to the unpruned one's scores.

    Raises:
        UserError: a schedule or a lesson of another kind.
    """

    schedule: Schedule = field(default_factory=Geometric)
    lesson: FineTuning | None = field(default_factory=lambda: FeatureDistillation(epochs=1))
    rescore: bool = False

    def __post_init__(self) -> None:
        if not hasattr(self.schedule, "limit") or not isinstance(self.lesson, (FineTuning, type(None))):
            raise UserError(
                "expected a schedule such as Geometric(4) and a lesson such as Distillation(epochs=1) or None, "
                f"got {self.schedule!r:.80} and {self.lesson!r:.80}"
            )

    def record(self) -> dict[str, Any]:
        """The settings as JSON."""
        return {"kind": type(self).__name__, "schedule": repr(self.schedule), "lesson": recorded(self.lesson),
                "rescore": self.rescore}  # fmt: skip

    def shrink(self, once: OneShot, job: Job, scores: GroupScores) -> Shrunk:
        """The network at its budgets, step by step.

        Args:
            once: how every step scores, searches and cuts.
            scores: of the unpruned network.

        Raises:
            InfeasibleBudget: no structure within reach meets the budgets; found out before the first step.
        """
        steps, standing = Steps(job), Standing.first(job)
        if steps.plan(1) is None:  # a run taken up again has passed this
            once.search(job.trace, scores, job.costs, job.asked)
        for step in range(1, self.schedule.steps + 1):
            if not steps.done(step):
                torch.manual_seed(_seed(job, step))
                with job.stage("distil"):
                    self._take(once, job, scores, standing, steps, step)
            # Read back even if it was made just now: what a later step sees never depends on where a run was killed.
            standing = steps.standing(step)
        records = tuple(steps.record(step) for step in range(1, self.schedule.steps + 1))
        return Shrunk(standing.model, job.keep(standing.plan), records)

    def _take(self, once: OneShot, job: Job, scores: GroupScores, standing: Standing, steps: Steps, step: int) -> None:
        """One step, from a plan to its record."""
        plan = steps.plan(step)
        if plan is None:
            plan = self._plan(once, job, scores, standing, step)
            steps.keep_plan(step, plan)
        where = f"step {step} of {self.schedule.steps}"
        job.tell(f"{where}: {shares(plan)} of the unpruned network")
        model, verdicts = once.carve(standing.model, job.split.scoring, standing.trace, plan.since(standing.plan),
                                     job.judge)  # fmt: skip
        repair = max(verdicts, key=lambda name: verdicts[name])
        job.tell(f"{where}: holdout accuracy {verdicts[repair]:.2%} after {repair}")
        taught = None
        if self.lesson is not None and step < self.schedule.steps:
            taught = self._teach(job, model, plan, self.lesson, steps, step)
            job.tell(f"{where}: holdout accuracy {taught:.2%} after the lesson")
        costs = {name: asdict(cost) for name, cost in plan.costs.items()}
        steps.keep(step, model, {"step": step, "costs": costs, "repair": repair, "accuracy_cut": verdicts[repair],
                                 "accuracy_taught": taught})  # fmt: skip

    def _teach(
        self, job: Job, model: nn.Module, plan: PruningPlan, lesson: FineTuning, steps: Steps, step: int
    ) -> float:
        """Train the network in place; its accuracy on the holdout."""

        def say(report: EpochReport) -> None:
            job.tell(f"step {step}, epoch {report.epoch} of {report.epochs}: loss {report.loss:.3f}")

        job.train(model, plan, lesson, seed=_seed(job, step), checkpoint=steps.lesson(step), on_epoch=say)
        return job.judge(model)

    def _plan(self, once: OneShot, job: Job, scores: GroupScores, standing: Standing, step: int) -> PruningPlan:
        """The step's plan, in the unpruned network's numbers."""
        losses = once.losses(job.trace, scores)
        if self.rescore and step > 1:
            now = once.score(standing.model, job.split.scoring, standing.trace)
            losses = standing.in_unpruned_numbers(once.losses(standing.trace, now), losses)

        def search(budgets: Sequence[Budget]) -> PruningPlan:
            return once.plan(job.trace, losses, job.costs, budgets, start=standing.plan if step > 1 else None)

        if step == self.schedule.steps:
            return job.search(search)
        base = {cost.name: cost.base for cost in job.costs}
        return search([Budget(b.cost, limit=self.schedule.limit(base[b.cost], job.limit(b), step))
                       for b in job.budgets])  # fmt: skip


def _seed(job: Job, step: int) -> int:
    """A step's own: the recovery after the last step has the job's."""
    return job.seed * 1_000 + step
