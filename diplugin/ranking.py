"""Which channels of a group leave first, apart from how many of them do.

DI losses have one unit everywhere, label variance, so they say well how many channels each layer can spare. Which ones
those are is another question, asked inside one layer, and there it helps to hear also how much of what the next layer
writes comes from a channel, labels or not, and how large the filters are that make it. `hand_out` joins the two: the
group's losses, from small to large, are handed out along the order in which its channels leave, so that a threshold
across the network gives DI's widths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: From DI losses [C], reader energies [C] (None where nothing reads) and squared norms of the filters [C] (None where
#: none produce the channels): values [C], the smallest leaves first.
Ranking = Callable[[Tensor, "Tensor | None", "Tensor | None"], Tensor]


@dataclass(frozen=True)
class ByLoss:
    """By DI loss alone."""

    def __call__(self, losses: Tensor, energies: Tensor | None, norms: Tensor | None = None) -> Tensor:
        return losses


@dataclass(frozen=True)
class ByEnergy:
    """By how much of the readers' outputs a channel makes."""

    def __call__(self, losses: Tensor, energies: Tensor | None, norms: Tensor | None = None) -> Tensor:
        return losses if energies is None else energies


@dataclass(frozen=True)
class ByBoth:
    """By the weighted geometric mean of both: energy^share · loss^(1 - share)."""

    share: float = 0.5

    def __call__(self, losses: Tensor, energies: Tensor | None, norms: Tensor | None = None) -> Tensor:
        if energies is None:
            return losses
        tiny = torch.finfo(torch.float64).tiny
        return energies.double().clamp(min=tiny).log() * self.share + losses.clamp(min=tiny).log() * (1 - self.share)


@dataclass(frozen=True)
class ByAll:
    """By the sum of two ranks: that of `ByBoth` and that of the filters' norms, which know nothing of the data.

    Attributes:
        both: what is heard beside the norms.
        weight: how much the norms' rank counts beside the other's.
    """

    both: Ranking = ByBoth()
    weight: float = 1.0

    def __call__(self, losses: Tensor, energies: Tensor | None, norms: Tensor | None = None) -> Tensor:
        values = self.both(losses, energies, None)
        return values if norms is None else _ranks(values) + self.weight * _ranks(norms.to(values.device))


#: The order for one ratio in all layers and a training afterwards, where it recovers as well as the largest filters.
#: The losses, which choose widths, have no say in it; where they do choose them, it does no better than `ByAll()`, and
#: keeps less of a hard cut before a training.
BY_ENERGY_AND_NORMS = ByAll(ByEnergy())


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort(stable=True).double()


def hand_out(losses: Tensor, values: Tensor, blocks: int = 1) -> Tensor:
    """The losses, sorted, given to channels in ascending order of `values`.

    With `blocks`, channels k, k + C/blocks, … leave together: units are ordered by their sums and each is given the
    losses of the unit of its rank.

    >>> hand_out(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.9, 0.1]))
    tensor([2., 3., 1.])
    """
    by_unit, rows = values.view(blocks, -1).sum(0), losses.view(blocks, -1)
    given = torch.empty_like(rows)
    given[:, by_unit.argsort(stable=True)] = rows[:, rows.sum(0).argsort(stable=True)]
    return given.flatten()


def lift_best(scores: Tensor, count: int, by: float, blocks: int = 1) -> Tensor:
    """Scores with `by` added to the best `count` units, which a threshold then spares.

    >>> lift_best(torch.tensor([1.0, 2.0, 3.0]), 2, 10.0)
    tensor([ 1., 12., 13.])
    """
    by_unit = scores.view(blocks, -1).sum(0)
    lifted = scores.view(blocks, -1).clone()
    lifted[:, by_unit.argsort(descending=True, stable=True)[:count]] += by
    return lifted.flatten()
