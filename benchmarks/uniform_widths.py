"""Contenders that keep the same share of every group's channels: what sets ranks and repair apart from widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from diplugin.contenders import Case
from diplugin.costs import macs
from diplugin.recovery import Cut, Reconstruct
from diplugin.scoring import group_norms
from diplugin.search import plan_at
from diplugin.strategies import OneShot


@dataclass(frozen=True)
class Uniform:
    """The same share of every group's channels, then our refit: what of our lead is widths, what is ranks and repair.

    Attributes:
        worth: group name -> [channels] of a case; the largest stay.
    """

    name: str
    worth: Callable[[Case], Mapping[str, torch.Tensor]]

    def prune(self, case: Case, fractions: Sequence[float]) -> dict[float, nn.Module | None]:
        worth, cost = self.worth(case), macs(case.trace)
        plans = {f: plan_at(case.trace, worth, [cost], self._widths(case, f)) for f in fractions}
        return {f: Reconstruct().repaired(Cut(case.model, case.images, case.trace, plan)) for f, plan in plans.items()}

    def _widths(self, case: Case, fraction: float) -> dict[str, int]:
        cost, groups = macs(case.trace), case.trace.prunable
        for step in range(1000):
            widths = {g.name: max(1, round(g.channels * (1 - step / 1000))) for g in groups}
            if cost.cost(widths) <= fraction * cost.base:
                break
        return widths


def norms(case: Case) -> dict[str, torch.Tensor]:
    """Squared norms of every channel's filters, over all layers that write it."""
    return group_norms(case.model, case.trace.groups)


def di_losses(case: Case) -> dict[str, torch.Tensor]:
    """What `compress` ranks channels by."""
    once = OneShot()
    return once.losses(case.trace, once.score(case.model, case.images, case.trace))
