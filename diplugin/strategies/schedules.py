"""Schedules: how far each step of a gradual strategy goes towards its budgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..errors import BudgetError


class Schedule(Protocol):
    """Limits on the way from the unpruned cost to a budget."""

    @property
    def steps(self) -> int: ...

    def limit(self, base: float, final: float, step: int) -> float:
        """What a cost may be after step 1 … `steps`; never below `final`, which is the last step's."""
        ...


@dataclass(frozen=True)
class Linear:
    """Every step takes off the same amount.

    Raises:
        BudgetError: no step.

    >>> [Linear(2).limit(100.0, 50.0, step) for step in (1, 2)]
    [75.0, 50.0]
    """

    steps: int = 4

    def __post_init__(self) -> None:
        _check(self.steps)

    def limit(self, base: float, final: float, step: int) -> float:
        return final if step >= self.steps else max(final, base + (final - base) * step / self.steps)


@dataclass(frozen=True)
class Geometric:
    """Every step takes off the same share of what is left, so that steps grow smaller as the network does.

    Raises:
        BudgetError: no step.

    >>> [round(Geometric(2).limit(100.0, 25.0, step)) for step in (1, 2)]
    [50, 25]
    """

    steps: int = 4

    def __post_init__(self) -> None:
        _check(self.steps)

    def limit(self, base: float, final: float, step: int) -> float:
        return (
            final if step >= self.steps or base <= final else max(final, base * (final / base) ** (step / self.steps))
        )


def _check(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise BudgetError(f"expected a schedule of 1 step or more, got {steps!r}")
