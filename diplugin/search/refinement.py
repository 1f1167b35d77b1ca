"""What is undone once all budgets hold: a descent that looks at one group at a time gives up more than it must.

`give_back` widens single groups where there is room. `exchange` widens one and narrows another for it: where a budget
lies between two steps of a staircase, no single group has room, and two of them may.
"""

from __future__ import annotations

from .problem import hold_after
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
            payer = _payer(structure, name, width, undone - best)
            if payer is not None:
                best, pair = undone - structure.loss_of(*payer), (payer, (name, width))
    for name, width in pair or ():
        structure.set_width(name, width)
    return pair is not None


def _payer(structure: Structure, name: str, width: int, most: float) -> tuple[str, int] | None:
    """The other group, and its width, by which all budgets hold with the group wider at the least loss below `most`."""
    if most <= 0:
        return None
    widths = {**structure.widths, name: width}
    costs = {m.name: structure.now[m.name] + m.change(structure.widths, name, width) for m, _ in structure.limits}
    found = None
    for other in (other for other in structure.groups if other != name):
        for narrower in structure.near_and_far(other):
            if structure.loss_of(other, narrower) >= most:
                break
            if hold_after(structure.limits, widths, costs, other, narrower):
                most, found = structure.loss_of(other, narrower), (other, narrower)
                break
    return found
