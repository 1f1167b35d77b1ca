"""A budget: a limit on one cost, absolute or as a fraction of the unpruned network's."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass

from ..errors import BudgetError
from .base import CostModel

_SCALES = {
    "macs": {"k": 1e3, "m": 1e6, "g": 1e9},
    "params": {"k": 1e3, "m": 1e6, "g": 1e9},
    "latency_ms": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "memory_mb": {"mb": 1.0, "kb": 1e-3, "gb": 1e3},
    "size_mb": {"mb": 1.0, "kb": 1e-3, "gb": 1e3},
    "bops": {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
}


@dataclass(frozen=True)
class Budget:
    """At most `fraction` of the unpruned cost, or at most `limit` in the cost's own unit; exactly one is given.

    Raises:
        BudgetError: both or neither are given, or a value that no network can meet or miss.

    >>> Budget("macs", fraction=0.5)
    Budget(cost='macs', fraction=0.5, limit=None)
    """

    cost: str
    fraction: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.limit is None):
            raise BudgetError(f"expected either a fraction or a limit for {self.cost!r}, got both or neither")
        value = self.fraction if self.limit is None else self.limit
        if not isinstance(value, numbers.Real):
            raise BudgetError(f"expected a number for {self.cost}, got {value!r:.80}; Budget.parse reads text")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise BudgetError(
                f"expected a fraction of {self.cost} above 0 and at most 1, got {self.fraction}; "
                f"an absolute limit needs its unit, such as {_example(self.cost)}"
            )
        if self.limit is not None and not (self.limit > 0 and math.isfinite(self.limit)):
            raise BudgetError(f"expected a positive limit for {self.cost}, got {self.limit}")

    def absolute(self, model: CostModel) -> float:
        """The limit in the cost's unit."""
        return self.limit if self.limit is not None else float(self.fraction or 0) * model.base

    def __str__(self) -> str:
        if self.fraction is not None:
            return f"{self.cost} <= {self.fraction:g} of the unpruned network"
        return f"{self.cost} <= {self.limit:g}"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`macs=0.5` is a fraction; `latency_ms=12ms`, `macs=60M`, `size_mb=2MB` are absolute.

        Raises:
            BudgetError: an unknown cost or unit, or no positive number.

        >>> Budget.parse("latency_ms=12ms").limit
        12.0
        """
        cost, equals, value = text.partition("=")
        cost = cost.strip()
        if not equals or cost not in _SCALES:
            raise BudgetError(
                f"expected a budget such as macs=0.5, with a cost among {', '.join(_SCALES)}; got {text!r}"
            )
        match = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)\s*", value.lower())
        if match is None:
            raise BudgetError(f"expected a number after {cost}=, such as {_example(cost)} or 0.5; got {value!r}")
        number, unit = float(match[1]), match[2]
        # A bare number is never absolute: macs=1.5 or latency_ms=12 is far more often a slip than a limit.
        if unit == "" and number <= 1:
            return cls(cost, fraction=number)
        if unit not in _SCALES[cost]:
            units = ", ".join(u.upper() if cost != "latency_ms" else u for u in _SCALES[cost] if u)
            what = f"unit {match[2]!r}" if unit else f"{number:g} without a unit"
            raise BudgetError(f"expected a fraction up to 1 or a number with a unit ({units}) for {cost}, got {what}")
        return cls(cost, limit=number * _SCALES[cost][unit])


def _example(cost: str) -> str:
    return {"latency_ms": "latency_ms=12ms", "memory_mb": "memory_mb=2MB", "size_mb": "size_mb=2MB"}.get(
        cost, f"{cost}=60M"
    )
