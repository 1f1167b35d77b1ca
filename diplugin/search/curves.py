"""What leaving channels out of a group loses: the curves that every search descends.

A `LossCurve` says in which order a group's units leave and how much information is gone with each; a `Scorer` brings
the curves, once or again on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from torch import Tensor

from ..errors import DataError
from ..groups import ChannelGroup


@dataclass(frozen=True)
class LossCurve:
    """In which order a group's remaining units leave, and the total loss once the first k of them are gone.

    Attributes:
        order: units, first to leave first.
        losses: len(order) + 1 non-decreasing numbers from 0, in the unit that all curves of a search share.
    """

    order: tuple[int, ...]
    losses: tuple[float, ...]


def first_order_curve(group: ChannelGroup, scores: Tensor, units: Sequence[int] | None = None) -> LossCurve:
    """Units by ascending score; losses add up (a unit's score is the sum over its channels).

    Args:
        scores: [group.channels], the loss of removing each channel alone.
        units: the ones still there; None for all.
    """
    per_unit = scores.view(group.blocks, group.units).sum(0).tolist()
    order = sorted(range(group.units) if units is None else units, key=lambda u: (per_unit[u], u))
    return LossCurve(tuple(order), (0.0, *accumulate(max(0.0, per_unit[u]) for u in order)))


class Scorer(Protocol):
    """Brings loss curves for the network that keeps the given units of every group."""

    def curves(self, kept: Mapping[str, Sequence[int]]) -> Mapping[str, LossCurve]: ...


@dataclass(frozen=True)
class FixedScores:
    """A `Scorer` whose scores never change: one pass over the unpruned network.

    Raises:
        DataError: a score that is NaN or infinite, of which no order and no sum means anything.
    """

    groups: Sequence[ChannelGroup]
    scores: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for group in self.groups:
            bad = int((~self.scores[group.name].isfinite()).sum())
            if bad:
                raise DataError(f"expected finite scores for group {group.name}, got NaN or infinity for {bad} of "
                                f"{group.channels} channels; check the model's weights and the data")  # fmt: skip

    def curves(self, kept: Mapping[str, Sequence[int]]) -> Mapping[str, LossCurve]:
        return {g.name: first_order_curve(g, self.scores[g.name], kept[g.name]) for g in self.groups}
