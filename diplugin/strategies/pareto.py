"""What a search over structures ends with: the outcomes that no other beats on both counts, and their picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..plots import new_figure, save_figure


@dataclass(frozen=True)
class Outcome:
    """One structure that was tried.

    Attributes:
        name: of the trial.
        accuracy: a fraction; NaN where a trial came to none, and the same with the cost.
        cost: in its own unit, milliseconds say.
        parameters: what the search had set.
    """

    name: str
    accuracy: float
    cost: float
    parameters: Mapping[str, Any] = field(default_factory=dict)


def pareto_front(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """Outcomes to which none is preferable, from the cheapest to the most accurate; none with NaN is among them.

    >>> found = pareto_front([Outcome("a", 0.9, 2.0), Outcome("b", 0.8, 1.0), Outcome("c", 0.7, 1.5)])
    >>> [outcome.name for outcome in found]
    ['b', 'a']
    """
    front: list[Outcome] = []
    for outcome in sorted(_known(outcomes), key=lambda o: (o.cost, -o.accuracy)):
        if not front or outcome.accuracy > front[-1].accuracy:
            front.append(outcome)
    return tuple(front)


def best_outcome(outcomes: Sequence[Outcome], limit: float | None = None) -> Outcome:
    """The most accurate outcome whose cost is within the limit, the cheapest of equals; never one with NaN.

    Raises:
        DataError: there is none.
    """
    within = [o for o in _known(outcomes) if limit is None or o.cost <= limit]
    if not within:
        raise DataError(f"expected an outcome within {limit:g}, none of {len(outcomes)} is" if limit is not None
                        else "expected outcomes to choose from, got none")  # fmt: skip
    return max(within, key=lambda o: (o.accuracy, -o.cost))


def _known(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those with both figures: NaN is neither above nor below anything, and would be first by chance."""
    return [o for o in outcomes if not isnan(o.accuracy) and not isnan(o.cost)]


def pareto_picture(outcomes: Sequence[Outcome], path: str | Path, cost: str, base: Outcome | None = None) -> Path:
    """Draw accuracy over cost into a PNG, SVG or PDF file, the front as a line; returns its path.

    Args:
        cost: what the horizontal axis shows, with its unit.
        base: the unpruned network.

    Raises:
        DataError: no outcomes.
        UserError: the name is of no such file, or it cannot be written.
    """
    if not outcomes:
        raise DataError("expected outcomes to draw, got none")
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    axes.plot([o.cost for o in outcomes], [o.accuracy * 100 for o in outcomes], "o", color="0.6", label="tried")
    front = pareto_front(outcomes)
    axes.plot([o.cost for o in front], [o.accuracy * 100 for o in front], "o-", color="C0", label="Pareto front")
    if base is not None:
        axes.plot([base.cost], [base.accuracy * 100], "s", color="C1", label="unpruned")
    axes.set_xlabel(cost)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
