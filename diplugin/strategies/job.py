"""What a strategy is given to work with, and what it gives back.

A `Job` is one compression seen by the strategy that carries it out: the unpruned network with its trace, costs and
budgets, the training data in its three views, a judge, a teacher at work, and a folder for checkpoints. How a plan
meets its budgets is settled here, once for every strategy: latency is planned with the table's held-out error to
spare, and by the clock where the table is this very machine's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..boundary import GuardedLoader
from ..costs import Budget, CostModel
from ..errors import InfeasibleBudget, PlanError
from ..holdout import Split
from ..measurements import Measure
from ..network import NetworkTrace
from ..plan import PruningPlan
from ..recovery import EpochReport, FeatureDistillation, FineTuning, matching, train
from ..run_folder import RunFolder
from ..surgery import PLAN_FILE, apply_plan
from .clock import search_by_clock

#: Finds a plan for budgets.
Search = Callable[[Sequence[Budget]], PruningPlan]


@dataclass(frozen=True)
class Job:
    """Attributes:
    model: the unpruned network in eval mode; never changed.
    costs: cost models of the unpruned network, one at least for every budget.
    unpruned_ms: its measured latency, where it was measured.
    augment: varies training images.
    tell: called with one line for whoever watches.
    stage: times what happens in its block under a name.
    """

    model: nn.Module
    trace: NetworkTrace
    costs: tuple[CostModel, ...]
    budgets: tuple[Budget, ...]
    split: Split
    measure: Measure
    folder: RunFolder
    seed: int
    unpruned_ms: float | None
    augment: Callable[[Tensor], Tensor] | None
    tell: Callable[[str], None]
    stage: Callable[[str], AbstractContextManager[None]]

    def judge(self, model: nn.Module) -> float:
        """Accuracy on the holdout, which choices are made by."""
        return self.measure.accuracy(model, self.split.holdout)

    def limit(self, budget: Budget) -> float:
        """A budget in its cost's unit; a fraction of the latency is of the measured one where that is less."""
        limit = budget.absolute(next(c for c in self.costs if c.name == budget.cost))
        if budget.cost != "latency_ms" or budget.fraction is None or not self.unpruned_ms:
            return limit
        return min(limit, budget.fraction * self.unpruned_ms)

    @property
    def asked(self) -> tuple[Budget, ...]:
        """The budgets as plans must meet them: latency in ms, see `limit`."""
        if not self._predicts_latency:
            return self.budgets  # for the search to refuse, if there is one on latency
        return tuple(Budget(b.cost, limit=self.limit(b)) if b.cost == "latency_ms" else b for b in self.budgets)

    @property
    def _predicts_latency(self) -> bool:
        return any(c.name == "latency_ms" for c in self.costs)

    def plan(self, search: Search) -> PruningPlan:
        """The plan for the job's budgets, kept in the run folder; a run taken up again finds it there.

        Raises:
            PlanError: the plan that was found is broken, or was not made for this network and these costs.
        """
        path = self.folder.path / PLAN_FILE
        if path.exists():
            return self.checked(PruningPlan.load(path), path)
        with self.stage("search"):
            return self.keep(self.search(search))

    def checked(self, plan: PruningPlan, path: Path) -> PruningPlan:
        """A plan from a file, if it says of this network what the job's costs say: verdicts are built on its numbers.

        Raises:
            PlanError: it does not.
        """

        def agrees(model: CostModel) -> bool:
            told = plan.costs.get(model.name)
            pairs = [] if told is None else [(told.base, model.base), (told.predicted, model.cost(plan.widths))]
            return bool(pairs) and all(math.isclose(one, other, rel_tol=1e-6) for one, other in pairs)

        fits = dict(plan.channels) == self.trace.base_widths and plan.inputs == self.trace.inputs
        if not fits or not all(agrees(model) for model in self.costs):
            raise PlanError(f"expected a plan for this network and its costs in {path}, got another's or one that was "
                            "edited; use another folder")  # fmt: skip
        return plan

    def keep(self, plan: PruningPlan) -> PruningPlan:
        """The plan, written into the run folder as the one that was carried out."""
        self.folder.write_text(PLAN_FILE, plan.to_json())
        return plan

    def search(self, search: Search) -> PruningPlan:
        """The plan for the job's budgets, latency with something to spare and by the clock if there is one here."""
        others = [b for b in self.budgets if b.cost != "latency_ms"]
        if len(others) == len(self.budgets) or not self._predicts_latency:
            return search(self.budgets)
        limit = min(self.limit(b) for b in self.budgets if b.cost == "latency_ms")

        def aimed(aim_ms: float) -> PruningPlan:
            return search([*others, Budget("latency_ms", limit=aim_ms)])

        def milliseconds(plan: PruningPlan) -> float:
            return self.measure.milliseconds(apply_plan(copy.deepcopy(self.model), plan, self.measure.inputs)) or limit

        plan = self._with_spare(aimed, limit)
        if not self.measure.local:
            return plan
        return search_by_clock(plan, aimed, milliseconds, limit, self.folder.log)

    def _with_spare(self, aimed: Callable[[float], PruningPlan], limit_ms: float) -> PruningPlan:
        """The plan that spares the table's error, or where none can the one that spares nothing."""
        table = self.measure.table
        spare = table.calibration.mape if table is not None and table.calibration is not None else 0.0
        try:
            return aimed(limit_ms * (1 - min(0.2, spare)))
        except InfeasibleBudget:
            return aimed(limit_ms)

    def train(
        self, model: nn.Module, plan: PruningPlan, settings: FineTuning, *, seed: int, checkpoint: Path,
        on_epoch: Callable[[EpochReport], None] | None = None,
    ) -> nn.Module:  # fmt: skip
        """The network, pruned by `plan`, after training with the unpruned one as teacher; in eval mode."""
        loader = GuardedLoader(self.split.training, self.augment)
        reading: dict[str, Any] = {"get_labels": self.measure.get_labels, "forward": self.measure.forward}
        with ExitStack() as stack:
            extra = None
            if isinstance(settings, FeatureDistillation) and settings.feature_weight:
                extra = stack.enter_context(
                    matching(model, self.model, self.trace, plan, self.split.scoring, settings, **reading)
                )
            return train(model, loader, settings, teacher=self.model, seed=seed, checkpoint=checkpoint,
                         on_epoch=on_epoch, extra=extra, **reading).eval()  # fmt: skip


@dataclass(frozen=True)
class Shrunk:
    """The pruned network, before its recovery.

    Attributes:
        plan: of the unpruned network.
        steps: a record of every step on the way, for `metrics.json`; empty for one shot.
    """

    model: nn.Module
    plan: PruningPlan
    steps: tuple[Mapping[str, Any], ...] = ()


def shares(plan: PruningPlan) -> str:
    """A plan's costs as shares of the unpruned network's."""
    return ", ".join(f"{name} {cost.fraction:.0%}" for name, cost in plan.costs.items())
