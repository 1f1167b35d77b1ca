"""What a gradual strategy leaves on disk after each step, so that a killed run goes on where it stopped.

stages/step-2.plan.json              the step's plan, once it is made
stages/step-2.lesson.safetensors     the state of its training, after every epoch
stages/step-2.safetensors            its network's weights
stages/step-2.json                   its record; last, so that a step that has it is done
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PlanError
from ..network import NetworkTrace, trace_network
from ..plan import PlannedCost, PruningPlan
from ..run_folder import STAGES, read_json
from ..surgery import apply_plan, load_weights, read_weights, save_weights
from .job import Job


@dataclass(frozen=True)
class Standing:
    """Where a network stands: pruned by `plan`, whose numbers are the unpruned network's, and trained since."""

    model: nn.Module
    trace: NetworkTrace
    plan: PruningPlan

    @classmethod
    def first(cls, job: Job) -> Standing:
        """Before the first step."""
        widths = job.trace.base_widths
        costs = {cost.name: PlannedCost(cost.base, cost.base) for cost in job.costs}
        return cls(job.model, job.trace, PruningPlan({n: tuple(range(w)) for n, w in widths.items()}, widths, costs,
                                                     job.trace.inputs))  # fmt: skip

    def in_unpruned_numbers(self, losses: Mapping[str, Tensor], elsewhere: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of this network's channels under the unpruned network's numbers; of channels that are gone, 0.

        Args:
            losses: group name -> [channels that are left].
            elsewhere: group name -> [channels of the unpruned network], for groups that `losses` does not name.
        """
        found = {}
        for name, kept in self.plan.kept.items():
            if name in losses:
                found[name] = torch.zeros(self.plan.channels[name], dtype=losses[name].dtype)
                found[name][list(kept)] = losses[name].cpu()
            else:
                found[name] = elsewhere[name]
        return found


class Steps:
    """The steps of one run, in its folder."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._place = job.folder.path / STAGES

    def done(self, step: int) -> bool:
        return self._path(step, "json").exists()

    def record(self, step: int) -> dict[str, Any]:
        return read_json(self._path(step, "json"))

    def plan(self, step: int) -> PruningPlan | None:
        """The step's plan, if it was made.

        Raises:
            PlanError: it is broken, or another network's.
        """
        path = self._path(step, "plan.json")
        return self._job.checked(PruningPlan.load(path), path) if path.exists() else None

    def keep_plan(self, step: int, plan: PruningPlan) -> None:
        self._write(step, "plan.json", plan.to_json())

    def lesson(self, step: int) -> Path:
        """Where the step's training keeps its state."""
        return self._path(step, "lesson.safetensors")

    def keep(self, step: int, model: nn.Module, record: Mapping[str, Any]) -> None:
        """Write the weights, then the record."""
        weights = self._path(step, "safetensors")
        save_weights(model, weights)
        self._job.folder.write_json(f"{STAGES}/{self._path(step, 'json').name}", record)
        self.lesson(step).unlink(missing_ok=True)

    def standing(self, step: int) -> Standing:
        """The network that a step has left.

        Raises:
            PlanError: its files are missing or broken.
        """
        job, path = self._job, self._path(step, "safetensors")
        plan = self.plan(step)
        if plan is None:
            raise PlanError(f"expected the plan of step {step} beside {path}, there is none; use another folder")
        model = apply_plan(copy.deepcopy(job.model), plan, job.measure.inputs).eval()
        load_weights(model, read_weights(path), str(path))
        return Standing(model, _traced(model, job, plan), plan)

    def _path(self, step: int, ending: str) -> Path:
        return self._place / f"step-{step}.{ending}"

    def _write(self, step: int, ending: str, text: str) -> None:
        self._job.folder.write_text(f"{STAGES}/{self._path(step, ending).name}", text)


def _traced(model: nn.Module, job: Job, plan: PruningPlan) -> NetworkTrace:
    """The trace of a network on its way: the unpruned network's groups, as wide as they are now.

    Notes are the unpruned network's, whose groups were verified. A group that looks different now (a depthwise
    convolution of one channel is an ordinary one) is left alone from here on.
    """
    trace, widths = trace_network(model, job.measure.inputs, verify=False), plan.widths
    groups = []
    for group in trace.groups:
        before = job.trace.by_name.get(group.name)
        if before is None or (before.prunable and widths[group.name] != group.channels):
            groups.append(replace(group, note=group.note or "pruning has changed what hangs together with it"))
        else:
            groups.append(replace(group, note=before.note))
    return replace(trace, groups=tuple(groups))
