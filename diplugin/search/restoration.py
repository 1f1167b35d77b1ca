"""What is tried before a budget is refused: ways out of a structure from which narrower widths free nothing.

Where narrower is never dearer there are none, and the search is over at once. A measured latency is not like that: on
the way down for one budget another may be overrun, from where only a wider group helps. Here groups go either way, one
at a time or two at once, as long as that lowers what all budgets together are exceeded by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..costs import Widths
from ..errors import TableError
from .structure import Structure

_TINY = 1e-12


@dataclass(frozen=True)
class _Trial:
    """Groups' new widths, what all limited costs are then, and the rank among trials: least excess, then least loss."""

    rank: tuple[float, float]
    widths: Mapping[str, int]
    costs: Mapping[str, float]


def restore(structure: Structure) -> bool:
    """Change widths until every budget holds; False if neither one group nor two bring the costs nearer to them."""
    while structure.violated():
        best = _best_trial(structure)
        if best is None:
            return False
        for name, width in best.widths.items():
            structure.set_width(name, width)
    return True


def _best_trial(structure: Structure) -> _Trial | None:
    """The single change of least excess, or the pair where no single one lowers it."""
    now = _Trial((_excess(structure, structure.now), 0.0), {}, structure.now)
    violated = [m for m, _ in structure.violated()]

    def best(trials: Iterable[_Trial]) -> _Trial | None:
        nearest = min(trials, key=lambda trial: trial.rank, default=now)
        return nearest if nearest.rank[0] < now.rank[0] - _TINY else None

    singles = list(_trials_after(structure, now))
    # Of a pair, one must help where it is needed; the other pays for it.
    helpful = [t for t in singles if any(t.costs[m.name] < now.costs[m.name] - _TINY * m.base for m in violated)]
    return best(singles) or best(pair for trial in helpful for pair in _trials_after(structure, trial))


def _trials_after(structure: Structure, before: _Trial) -> Iterator[_Trial]:
    """One group more than before at another width, narrower or wider; widths that a table knows no time for are not."""
    here: Widths = {**structure.widths, **before.widths}
    for name in (name for name in structure.groups if name not in before.widths):
        for width in (*structure.near_and_far(name), *structure.wider_near_and_far(name)):
            try:
                costs = {m.name: before.costs[m.name] + m.change(here, name, width) for m, _ in structure.limits}
            except TableError:
                continue
            loss = before.rank[1] + structure.loss_of(name, width)
            yield _Trial((_excess(structure, costs), loss), {**before.widths, name: width}, costs)


def _excess(structure: Structure, costs: Mapping[str, float]) -> float:
    """By how much all budgets together are exceeded, in shares of what the unpruned network costs."""
    return sum(max(0.0, costs[m.name] - limit) / m.base for m, limit in structure.limits)
