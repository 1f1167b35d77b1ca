"""Bits per output channel: the frozen result, and the search that spends a budget where bits save most.

Every channel has a table of damages, one for each bit width. Least total damage under a budget is a knapsack problem
with one choice a channel; a price on cost makes the channels independent, and the price is bisected until the budget
holds. What the bisection leaves of the budget is spent greedily. A layer that would use a bit width for so few
channels that the width's own nodes in the file outweigh them gives those channels the next width it uses.
"""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import InfeasibleBudget, PlanError
from ..whole_files import write_json
from .grid import BIT_WIDTHS

Widths = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class BitAllocation:
    """Bits of every output channel of every quantized layer; 0 means that the channel's weights are all zero.

    >>> BitAllocation({"conv": (8, 4, 4, 0)}).mean_bits()
    4.0
    """

    bits: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not self.bits:
            raise PlanError("expected bits of a layer at least, got none")
        for layer, widths in self.bits.items():
            if not widths or set(widths) - set(BIT_WIDTHS):
                raise PlanError(f"expected bits out of {BIT_WIDTHS} for every channel of {layer!r}, got {widths!r:.60}")

    def mean_bits(self, inputs: Mapping[str, int] | None = None) -> float:
        """Mean over weights; `inputs` gives the weights per output channel of each layer (equal ones without it)."""
        share = {layer: (inputs[layer] if inputs else 1) for layer in self.bits}
        total = sum(len(widths) * share[layer] for layer, widths in self.bits.items())
        return sum(sum(widths) * share[layer] for layer, widths in self.bits.items()) / total

    def counts(self) -> dict[int, int]:
        """Channels of each bit width."""
        return {b: sum(widths.count(b) for widths in self.bits.values()) for b in BIT_WIDTHS}

    def to_json(self) -> dict[str, Any]:
        return {"version": 1, "bits": {layer: list(widths) for layer, widths in self.bits.items()}}

    @classmethod
    def from_json(cls, data: Any) -> BitAllocation:
        """Raises PlanError where `data` is not what `to_json` gives."""
        try:
            if data["version"] != 1:
                raise PlanError(f"expected version 1 of a bit allocation, got {data['version']!r}")
            return cls({str(k): tuple(map(operator.index, v)) for k, v in data["bits"].items()})
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(f"expected a bit allocation with 'version' and 'bits', got {data!r:.80}") from error

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> BitAllocation:
        """Raises PlanError where there is no whole allocation at `path`."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise PlanError(f"expected a bit allocation at {path}, got {error}") from error


class BitCost(Protocol):
    """What bits cost, in one unit: a fixed part and a sum over layers."""

    @property
    def name(self) -> str: ...

    def channel(self, layer: str, width: int) -> float:
        """About what one channel of `layer` costs at `width` bits."""
        ...

    def layer(self, layer: str, bits: np.ndarray) -> float:
        """What the layer costs with these bits, everything included."""
        ...

    def total(self, bits: Widths) -> float: ...


@dataclass(frozen=True)
class Limit:
    """At most `most` of `cost`, in its own unit."""

    cost: BitCost
    most: float

    def holds(self, bits: Widths) -> bool:
        return self.cost.total(bits) <= self.most


@dataclass(frozen=True)
class Choice:
    """What may be chosen: layer -> widths (ascending) open to its channels; a fixed layer has one."""

    widths: Mapping[str, tuple[int, ...]]
    channels: Mapping[str, int]

    def lowest(self) -> dict[str, np.ndarray]:
        """Every channel at its least width, but no layer without any channel above zero."""
        bits = {}
        for layer, widths in self.widths.items():
            bits[layer] = np.full(self.channels[layer], widths[0])
            if widths[0] == 0 and len(widths) > 1:
                bits[layer][0] = widths[1]
        return bits


def least_damage(damage: Mapping[str, np.ndarray], choice: Choice, limits: Sequence[Limit]) -> dict[str, np.ndarray]:
    """Bits with (nearly) the least total damage that hold every limit.

    Args:
        damage: layer -> [C, B], a column for each width in `choice.widths[layer]`.

    Raises:
        InfeasibleBudget: not even the lowest widths hold the limits; names what they cost.
    """
    start = cheapest(choice, limits)
    tables = {layer: _falling(damage[layer]) for layer in choice.widths}
    prices = {
        layer: np.array([sum(limit.cost.channel(layer, b) / limit.most for limit in limits) for b in widths])
        for layer, widths in choice.widths.items()
    }

    def at(price: float) -> dict[str, np.ndarray]:
        picked = {}
        for layer, widths in choice.widths.items():
            index = (tables[layer] + price * prices[layer]).argmin(1)
            if widths[0] == 0 and len(widths) > 1 and not index.any():
                index[tables[layer][:, 0].argmax()] = 1
            picked[layer] = _consolidated(layer, np.array(widths)[index], choice, limits)
        return picked

    around = _magnitude(tables)
    low, high = around - 40.0, around + 40.0
    best = at(2.0**low)
    if all(limit.holds(best) for limit in limits):
        return best
    best = start
    for _ in range(50):
        middle = (low + high) / 2
        bits = at(2.0**middle)
        if all(limit.holds(bits) for limit in limits):
            best, high = bits, middle
        else:
            low = middle
    return _spend_rest(best, tables, choice, limits)


def cheapest(choice: Choice, limits: Sequence[Limit]) -> dict[str, np.ndarray]:
    """Bits that hold every limit with every channel about as low as it may be.

    Raises:
        InfeasibleBudget: there are none.
    """
    above_zero = {layer: next((b for b in widths if b), 0) for layer, widths in choice.widths.items()}
    candidates = [
        choice.lowest(),
        {layer: np.full(choice.channels[layer], b) for layer, b in above_zero.items()},
        {layer: _smallest(layer, choice, limits) for layer in choice.widths},
    ]
    for bits in candidates:
        if all(limit.holds(bits) for limit in limits):
            return bits
    reached, limit = max(
        ((min(limit.cost.total(bits) for bits in candidates), limit) for limit in limits),
        key=lambda pair: pair[0] / pair[1].most,
    )
    raise InfeasibleBudget(
        f"expected {limit.cost.name} of at most {limit.most:.4g}, the smallest reachable is {reached:.4g} with every "
        f"channel at its lowest width; raise the budget or prune first"
    )


def _smallest(layer: str, choice: Choice, limits: Sequence[Limit]) -> np.ndarray:
    """The layer's cheapest bits; in a small one the nodes of a width outweigh its channels."""
    options = [choice.lowest()[layer], *(np.full(choice.channels[layer], b) for b in choice.widths[layer] if b)]
    return min(options, key=lambda bits: sum(limit.cost.layer(layer, bits) / limit.most for limit in limits))


def _magnitude(tables: Mapping[str, np.ndarray]) -> float:
    """log₂ of the largest damage, in whole twenties: prices are looked for in damages' own unit, whatever it is."""
    largest = max(float(table.max(initial=0.0)) for table in tables.values())
    return 20.0 * int(np.log2(largest) / 20) if largest > 0 else 0.0


def _falling(damage: np.ndarray) -> np.ndarray:
    """The table without noise that would make more bits look worse than fewer."""
    return np.maximum.accumulate(np.maximum(damage, 0.0)[:, ::-1], axis=1)[:, ::-1]


def _consolidated(layer: str, bits: np.ndarray, choice: Choice, limits: Sequence[Limit]) -> np.ndarray:
    """Widths whose channels cost less at the next width in use are given up for it."""
    used = [b for b in choice.widths[layer] if (bits == b).any()]
    for narrow, wide in itertools.pairwise(used):
        wider = np.where(bits == narrow, wide, bits)
        if all(limit.cost.layer(layer, wider) <= limit.cost.layer(layer, bits) for limit in limits):
            bits = wider
    return bits


def _spend_rest(
    bits: dict[str, np.ndarray], tables: Mapping[str, np.ndarray], choice: Choice, limits: Sequence[Limit]
) -> dict[str, np.ndarray]:
    """Raise channels one width at a time, best saving per cost first, as long as every limit holds."""
    left = [limit.most - limit.cost.total(bits) for limit in limits]
    steps = []
    for layer, widths in choice.widths.items():
        for channel, width in enumerate(bits[layer]):
            rank = widths.index(int(width))
            if rank + 1 < len(widths):
                saved = tables[layer][channel, rank] - tables[layer][channel, rank + 1]
                cost = sum((limit.cost.channel(layer, widths[rank + 1]) - limit.cost.channel(layer, widths[rank]))
                           / limit.most for limit in limits)  # fmt: skip
                steps.append((saved / cost, layer, channel, widths[rank + 1]))
    for ratio, layer, channel, width in sorted(steps, key=lambda step: step[0], reverse=True):
        if ratio <= 0:
            break
        raised = bits[layer].copy()
        raised[channel] = width
        extra = [limit.cost.layer(layer, raised) - limit.cost.layer(layer, bits[layer]) for limit in limits]
        if all(e <= rest for e, rest in zip(extra, left, strict=True)):
            bits[layer] = raised
            left = [rest - e for rest, e in zip(left, extra, strict=True)]
    return bits
