"""What a structure costs, as a function of how many channels every group keeps.

A cost model never sees the network: it is built once from a `NetworkTrace` and then asked thousands of times. Most
costs are sums of terms that each depend on one or two groups (a layer's input and output side); `SeparableCost`
remembers every term's values, so that asking what one group's next width would save costs microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

Widths = Mapping[str, int]


@runtime_checkable
class CostModel(Protocol):
    """A cost in one unit. `name` is what budgets, plans and metrics call it.

    A model may offer more, which the search uses where it is there: `neighbours(group)`, the groups whose changes
    depend on this one's width; `allowed_widths(group)`, the widths it knows; `guide`, a smoother cost model that
    says which way is down where the cost itself, being a maximum, does not; and `sums`, lists of `Term`s: the cost is
    their sum, or the largest of their sums if there are several, less the amount of `step`, a `Step` or None, where it
    is not due.
    """

    name: str
    unit: str

    @property
    def base(self) -> float:
        """Cost of the unpruned network."""
        ...

    def cost(self, widths: Widths) -> float:
        """Cost of the network whose groups keep `widths` channels."""
        ...

    def change(self, widths: Widths, group: str, width: int) -> float:
        """What the cost grows by (negative: falls) when `group` goes from `widths[group]` to `width`."""
        ...


@dataclass(frozen=True)
class Term:
    """One summand: a function of the widths of a few groups."""

    groups: tuple[str, ...]
    value: Callable[[Widths], float]


@dataclass(frozen=True)
class Step:
    """A part of a cost that is due only while some other sum of terms is above a limit."""

    amount: float
    terms: tuple[Term, ...]
    limit: float


class SeparableCost:
    """A cost that is a sum of `Term`s.

    >>> cost = SeparableCost("params", "", {"a": 4}, [Term(("a",), lambda w: 9.0 * w["a"])])
    >>> cost.base, cost.change({"a": 4}, "a", 3)
    (36.0, -9.0)
    """

    def __init__(self, name: str, unit: str, base_widths: Widths, terms: Sequence[Term]) -> None:
        self.name, self.unit = name, unit
        self._base_widths, self._terms = dict(base_widths), tuple(terms)
        self._base: float | None = None
        self._touching: dict[str, list[int]] = {}
        for i, term in enumerate(self._terms):
            for group in dict.fromkeys(term.groups):
                self._touching.setdefault(group, []).append(i)
        self._known: list[dict[tuple[int, ...], float]] = [{} for _ in self._terms]

    @property
    def base(self) -> float:
        if self._base is None:
            self._base = self.cost(self._base_widths)
        return self._base

    @property
    def sums(self) -> tuple[tuple[Term, ...], ...]:
        return (self._terms,)

    def cost(self, widths: Widths) -> float:
        return sum(self._value(i, widths) for i in range(len(self._terms)))

    def change(self, widths: Widths, group: str, width: int) -> float:
        touching = self._touching.get(group, [])
        after = {**widths, group: width}
        return sum(self._value(i, after) - self._value(i, widths) for i in touching)

    def neighbours(self, group: str) -> set[str]:
        """Groups that share a term with this one, itself included: whose changes in cost depend on its width."""
        return {group, *(g for i in self._touching.get(group, []) for g in self._terms[i].groups)}

    def _value(self, index: int, widths: Widths) -> float:
        term, known = self._terms[index], self._known[index]
        key = tuple(widths[g] for g in term.groups)
        if key not in known:
            known[key] = term.value(widths)
        return known[key]
