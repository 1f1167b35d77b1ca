"""What is undone once all budgets hold: a descent that looks at one group at a time gives up more than it must.

`give_back` widens single groups where there is room. `exchange` widens one and narrows another for it: where a budget
lies between two steps of a staircase, no single group has room, and two of them may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .problem import Limit, exceeds
from .structure import LOOK_AHEAD, Structure

#: Least share of the loss that an exchange saves: losses are estimates, and none is as good as this.
_WORTHWHILE = 0.01


def refine(structure: Structure) -> None:
    """Give back and exchange until neither finds anything; every budget holds before and after."""
    give_back(structure)
    while exchange(structure):
        give_back(structure)


def give_back(structure: Structure) -> None:
    """Widen groups again, the dearest channels first, while every budget still holds."""
    blocked: set[str] = set()
    while True:
        open_ = {n: wider for n in structure.groups if n not in blocked and (wider := structure.wider(n))}
        if not open_:
            return
        name = max(open_, key=lambda n: _undone_per_channel(structure, n, open_[n][0]))
        # The next width may be dearer than one beyond it, as right off a multiple of eight.
        width = next((w for w in open_[name] if structure.fits(name, w)), None)
        if width is None:
            blocked.add(name)
        else:
            structure.set_width(name, width)


def _undone_per_channel(structure: Structure, name: str, width: int) -> float:
    return -structure.loss_of(name, width) / (width - structure.widths[name])


def exchange(structure: Structure) -> bool:
    """Widen one group and narrow another for it, the pair that saves most loss; False if none is worth while."""
    best, pair = _WORTHWHILE * structure.loss, None
    for name in structure.groups:
        for width in structure.wider(name)[:LOOK_AHEAD]:
            undone = -structure.loss_of(name, width)
            if undone <= best:
                continue
            widened = _Widened.of(structure, name, width)
            for other in structure.groups:
                found = None if other == name else _payment(widened, other, undone - best)
                if found is not None:
                    best, pair = undone - structure.loss_of(other, found), {other: found, name: width}
    for name, width in (pair or {}).items():
        structure.set_width(name, width)
    return pair is not None


@dataclass(frozen=True)
class _Widened:
    """A structure as it would be with one group wider: asked for many ways to pay for it."""

    structure: Structure
    widths: Mapping[str, int]
    costs: Sequence[tuple[Limit, float]]

    @classmethod
    def of(cls, structure: Structure, name: str, width: int) -> _Widened:
        costs = [((m, limit), structure.now[m.name] + m.change(structure.widths, name, width))
                 for m, limit in structure.limits]  # fmt: skip
        return cls(structure, {**structure.widths, name: width}, costs)

    def fits(self, other: str, width: int) -> bool:
        """Whether every budget holds once the other group has this width."""
        after = {**self.widths, other: width}
        return not any(exceeds(m, limit, cost + m.change(self.widths, other, width), after)
                       for (m, limit), cost in self.costs)  # fmt: skip


def _payment(widened: _Widened, other: str, most: float) -> int | None:
    """The widest width of the other group at which all budgets hold, if that loses less than `most`."""
    for width in widened.structure.near_and_far(other):
        if widened.structure.loss_of(other, width) >= most:
            return None
        if widened.fits(other, width):
            return width
    return None
