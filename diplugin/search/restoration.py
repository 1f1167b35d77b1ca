"""What is tried before a budget is refused: ways out of a structure from which narrower widths free nothing.

Where narrower is never dearer there are none, and the search is over at once. A measured latency is not like that: on
the way down for one budget another may be overrun, from where only a wider group helps. Here groups go either way, one
at a time or two at once, as long as that lowers what all budgets together are exceeded by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..costs import CostModel, Widths
from ..errors import TableError
from .problem import exceeds
from .structure import Structure

#: Of an excess that rounding hides: more than none.
_LEAST = 1e-18


@dataclass(frozen=True)
class _Trial:
    """Groups' new widths, what all limited costs are then, and the rank among trials: least excess, then least loss."""

    rank: tuple[float, float]
    widths: Mapping[str, int]
    costs: Mapping[str, float]


def restore(structure: Structure) -> bool:
    """Change widths until every budget holds; False if neither one group nor two bring the costs nearer to them."""
    now = _present(structure)
    while structure.violated():
        best = _best_trial(structure, now)
        if best is None:
            return False
        for name, width in best.widths.items():
            structure.set_width(name, width)
        before, now = now, _present(structure)
        if now.rank >= before.rank:  # what seemed nearer was rounding
            return False
    return True


def _present(structure: Structure) -> _Trial:
    """The structure as it is, its costs computed afresh: sums of changes carry rounding."""
    costs = {m.name: m.cost(structure.widths) for m, _ in structure.limits}
    return _Trial((_excess(structure, structure.widths, costs), 0.0), {}, costs)


def _best_trial(structure: Structure, now: _Trial) -> _Trial | None:
    """The single change of least excess, or the pair where no single one lowers it."""

    def best(trials: Iterable[_Trial]) -> _Trial | None:
        nearest = min(trials, key=lambda trial: trial.rank, default=now)
        return nearest if nearest.rank[0] < now.rank[0] else None

    singles = list(_trials_after(structure, now))
    # Of a pair, one must help where it is needed; the other pays for it.
    return best(singles) or best(
        pair for trial in singles if _helps(structure, now, trial) for pair in _trials_after(structure, trial)
    )


def _helps(structure: Structure, now: _Trial, trial: _Trial) -> bool:
    """Whether a trial brings one of the costs nearer to its budget."""
    after: Widths = {**structure.widths, **trial.widths}
    return any(
        _over(m, limit, trial.costs[m.name], after) < _over(m, limit, now.costs[m.name], structure.widths)
        for m, limit in structure.limits
    )


def _trials_after(structure: Structure, before: _Trial) -> Iterator[_Trial]:
    """One group more than before at another width, narrower or wider; widths that a table knows no time for are not."""
    here: Widths = {**structure.widths, **before.widths}
    for name in (name for name in structure.groups if name not in before.widths):
        for width in (*structure.near_and_far(name), *structure.wider_near_and_far(name)):
            try:
                costs = {m.name: before.costs[m.name] + m.change(here, name, width) for m, _ in structure.limits}
                excess = _excess(structure, {**here, name: width}, costs)
            except TableError:
                continue
            loss = before.rank[1] + structure.loss_of(name, width)
            yield _Trial((excess, loss), {**before.widths, name: width}, costs)


def _excess(structure: Structure, widths: Widths, costs: Mapping[str, float]) -> float:
    """By how much all budgets together are exceeded."""
    return sum(_over(m, limit, costs[m.name], widths) for m, limit in structure.limits)


def _over(model: CostModel, limit: float, cost: float, widths: Widths) -> float:
    """By how much a budget is exceeded, in shares of what the unpruned network costs."""
    return max((cost - limit) / model.base, _LEAST) if exceeds(model, limit, cost, widths) else 0.0
