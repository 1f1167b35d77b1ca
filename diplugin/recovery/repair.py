"""Repairs: what is done to a network right after surgery, without a gradient step, and which of them helped.

A repair is an object that turns the unpruned network and a plan into a pruned, working one. Which repair serves best
depends on the network and on how hard it was cut, so `best_repair` tries several and lets the holdout decide: one that
would hurt is refused by measurement.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ..errors import UserError
from ..features import Forward, forward_inputs
from ..network import NetworkTrace
from ..plan import PruningPlan
from ..surgery import apply_plan
from .batchnorm import recalibrate_batchnorm
from .compensation import compensate
from .reconstruction import Reconstruction, reconstruct


@dataclass(frozen=True)
class Cut:
    """What a repair needs to know: the network, the data and the plan."""

    model: nn.Module
    loader: Iterable[Any]
    trace: NetworkTrace
    plan: PruningPlan
    images: int = 2000
    forward: Forward = forward_inputs
    inputs: tuple[Any, ...] | None = None

    def pruned(self, model: nn.Module | None = None) -> nn.Module:
        """A pruned copy of the network (or of the given copy of it, in place)."""
        return apply_plan(model if model is not None else copy.deepcopy(self.model), self.plan, self.inputs)


class Repair(Protocol):
    """Gives the pruned and repaired network; the unpruned one is left alone."""

    @property
    def name(self) -> str: ...

    def repaired(self, cut: Cut) -> nn.Module: ...


@dataclass(frozen=True)
class Recalibrate:
    """New BatchNorm statistics and nothing else."""

    name: str = "recalibration"

    def repaired(self, cut: Cut) -> nn.Module:
        return recalibrate_batchnorm(cut.pruned(), cut.loader, images=cut.images, forward=cut.forward)


@dataclass(frozen=True)
class Compensate:
    """Removed channels folded into the next layer's weights, then new BatchNorm statistics."""

    name: str = "compensation"

    def repaired(self, cut: Cut) -> nn.Module:
        model = copy.deepcopy(cut.model)
        compensate(model, cut.loader, cut.trace, cut.plan, images=cut.images, forward=cut.forward)
        return recalibrate_batchnorm(cut.pruned(model), cut.loader, images=cut.images, forward=cut.forward)


@dataclass(frozen=True)
class Reconstruct:
    """Every layer refitted to the unpruned network's outputs, one after the other."""

    settings: Reconstruction = field(default_factory=Reconstruction)
    name: str = "reconstruction"

    def repaired(self, cut: Cut) -> nn.Module:
        model = cut.pruned()
        reconstruct(model, cut.model, cut.loader, cut.trace, cut.plan, self.settings, forward=cut.forward)
        return model


REPAIRS: tuple[Repair, ...] = (Recalibrate(), Compensate(), Reconstruct())


def best_repair(
    cut: Cut, repairs: Sequence[Repair], judge: Callable[[nn.Module], float]
) -> tuple[nn.Module, dict[str, float]]:
    """The repaired network that the judge likes best, and what it said of each; a name met before gets a number.

    Args:
        judge: higher is better; give it holdout data, never the data that figures are reported on.

    Raises:
        UserError: no repairs.
    """
    best: nn.Module | None = None
    verdicts: dict[str, float] = {}
    for repair in repairs:
        model = repair.repaired(cut)
        verdict = judge(model)
        if best is None or verdict > max(verdicts.values()):
            best = model
        same = sum(other.name == repair.name for other in repairs[: len(verdicts)])
        verdicts[f"{repair.name} {same + 1}" if same else repair.name] = verdict
    if best is None:
        raise UserError("expected a repair to try at least, such as Recalibrate(), got none")
    return best.eval(), verdicts
