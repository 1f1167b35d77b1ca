"""Latency as a cost: the sum of a table's entries over a network's layers, corrected by the table's calibration.

Every convolution and linear layer is one term; BatchNorm and the activation behind it are fused into its entry by
the runtime, and what no entry covers (pooling, additions, calls) is in the calibration's offset.

The calibration's refill is paid by nets whose weights outgrow the device's cache. It hangs on all widths at once, so it
is no term but a `Step`: `sums` and `guide` always count it, `cost` and `change` where it is due.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cached_property
from math import prod

from ..errors import RoundedLatencyWarning, TableError, UncalibratedLatencyWarning
from ..network import LayerSpec, NetworkTrace, Width
from ..tables import LatencyTable, OpKey
from .base import SeparableCost, Step, Term, Widths


def op_key(layer: LayerSpec, cin: int, cout: int, dtype: str = "float32") -> OpKey:
    """The key of one layer call at other widths; `layer` is a convolution or a linear layer."""
    batch, activation = layer.input_shape[0], layer.activation or ""
    if layer.op == "linear":
        rows = prod(layer.input_shape[1:-1])
        return OpKey("linear", cin, cout, size=(rows,), activation=activation, batch=batch, dtype=dtype)
    groups = cin if layer.depthwise else layer.groups
    return OpKey(layer.op, cin, cout, layer.kernel, layer.stride, layer.padding, layer.dilation, groups,
                 tuple(layer.input_shape[2:]), activation, batch, dtype)  # fmt: skip


class LayerSides:
    """One timed layer with its two widths as functions of the groups' widths."""

    def __init__(self, trace: NetworkTrace, layer: LayerSpec, dtype: str = "float32") -> None:
        self.layer, self.dtype = layer, dtype
        self.inside: Width = trace.width(layer.name, "in", layer.in_channels)
        self.outside: Width = trace.width(layer.name, "out", layer.out_channels)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(group for side in (self.inside, self.outside) for group, _ in side.parts))

    def key(self, widths: Widths) -> OpKey:
        return op_key(self.layer, self.inside.at(widths), self.outside.at(widths), self.dtype)


def timed_layers(trace: NetworkTrace, dtype: str = "float32") -> list[LayerSides]:
    """The layers that have entries in a table, in execution order."""
    return [LayerSides(trace, layer, dtype) for layer in trace.layers if layer.op != "norm"]


class LatencyCost(SeparableCost):
    """Predicted latency in ms on the table's device.

    Args:
        trace: of the unpruned network, traced at the batch that will run.
        table: covers the network's layers at the widths that will be asked for.
        dtype: "float32" or "int8"; by default what the table is of.

    Raises:
        TableError: the table lacks an entry for the unpruned network, or was timed on an emulator.
    """

    def __init__(self, trace: NetworkTrace, table: LatencyTable, dtype: str | None = None) -> None:
        table.check_guides()
        self.table, self._trace, self.dtype = table, trace, dtype or table.dtype
        self._layers = timed_layers(trace, self.dtype)
        self._warned = False
        missing = table.missing(layer.key(trace.base_widths) for layer in self._layers)
        if missing:
            raise table.missing_error(missing)
        if table.calibration is None:
            warnings.warn(f"table {table.name!r} has no end-to-end calibration: latencies are uncalibrated sums",
                          UncalibratedLatencyWarning, stacklevel=2)  # fmt: skip
        self._weights = SeparableCost("weights", "bytes", trace.base_widths, list(self._weight_terms()))
        self.step = self._step()
        super().__init__("latency_ms", "ms", trace.base_widths, list(self._terms_of()))

    def _weight_terms(self) -> Iterator[Term]:
        for layer in self._layers:
            yield Term(layer.groups, lambda w, layer=layer: layer.key(w).weight_bytes)

    def _terms_of(self) -> Iterator[Term]:
        calibration = self.table.calibration
        scale = calibration.scale if calibration is not None else 1.0
        offset = calibration.offset_ms if calibration is not None else self.table.overhead_ms
        refill = self.step.amount if self.step is not None else 0.0
        yield Term((), lambda _: offset + refill)
        for layer in self._layers:
            yield Term(layer.groups, lambda w, layer=layer: scale * self._entry_ms(layer, w))

    def _entry_ms(self, layer: LayerSides, widths: Widths) -> float:
        key = layer.key(widths)
        found = self.table.resolve(key)
        if found is None:
            raise self.table.missing_error([key])
        if found != key and not self._warned:
            self._warned = True
            warnings.warn(f"no entry for '{key.text}': using the wider '{found.text}' (said once)",
                          RoundedLatencyWarning, stacklevel=2)  # fmt: skip
        return self.table.by_key[found].latency_ms

    def cost(self, widths: Widths) -> float:
        return super().cost(widths) - self._spared_ms(widths)

    def change(self, widths: Widths, group: str, width: int) -> float:
        grown = super().change(widths, group, width)
        if self.step is None:
            return grown
        return grown + self._spared_ms(widths) - self._spared_ms({**widths, group: width})

    def _spared_ms(self, widths: Widths) -> float:
        """The refill if a net's weights stay in the cache, although the unpruned net's do not."""
        return self.step.amount if self.step is not None and self._weights.cost(widths) <= self.step.limit else 0.0

    def _step(self) -> Step | None:
        """The refill, where the unpruned net pays one; narrower nets hold fewer weights, so else none does."""
        calibration = self.table.calibration
        refill = calibration.refill(self._weights.base / 1e6) if calibration is not None else 0.0
        if calibration is None or not refill:
            return None
        return Step(refill, self._weights.sums[0], calibration.cache_mb * 1e6)

    @cached_property
    def guide(self) -> SeparableCost:
        """The cost without its one step down, which no move far from it would see."""
        if self.step is None:
            return self
        return SeparableCost(self.name, self.unit, self._base_widths, self._terms)

    @property
    def calibrated(self) -> bool:
        return self.table.calibration is not None

    @property
    def text(self) -> str:
        """Where predictions come from and how far they can be trusted, in one line."""
        kind = f"{self.dtype} " if self.dtype != "float32" else ""
        return f"{kind}{self.table.origin} on {self.table.device}, {self.table.setting.text}; {self.table.quality}"

    def sum_ms(self, widths: Widths) -> float:
        """The plain sum of entries, before calibration."""
        return sum(self._entry_ms(layer, widths) for layer in self._layers)

    @cached_property
    def _rounded(self) -> frozenset[LayerSides]:
        """Layers that the table's grid does not hit: behind a concatenation, or not profiled at their own widths."""
        own = [(layer, layer.key(self._trace.base_widths) in self.table.by_key) for layer in self._layers]
        return frozenset(layer for layer, hit in own
                         if not hit or len(layer.inside.parts) > 1 or len(layer.outside.parts) > 1)  # fmt: skip

    def allowed_widths(self, group: str) -> tuple[int, ...] | None:
        """Widths of a group that the search may use: profiled, aligned, and on the lower envelope.

        A layer that was not profiled at its unpruned widths, a table of a wider network being at hand, is rounded up.
        The lower envelope leaves out widths at which the layers touching the group take no less time than at some
        wider one, all other groups unpruned. None: no timed layer touches the group, every width costs the same.
        """
        touching = [layer for layer in self._layers if group in layer.groups]
        if not touching:
            return None
        base = self._trace.base_widths
        channels, blocks = base[group], self._trace.by_name[group].blocks
        allowed: list[int] = []
        cheapest = float("inf")
        for width in range(channels, 0, -1):
            if width % blocks or not (width == channels or self.table.alignment.aligned(width)):
                continue
            total = self._profiled_ms(touching, {**base, group: width})
            if total is not None and total < cheapest:
                cheapest = total
                allowed.append(width)
        return tuple(reversed(allowed))

    def _profiled_ms(self, layers: list[LayerSides], widths: Widths) -> float | None:
        """The layers' time if every one of them was profiled, exactly or, where the grid is not theirs, rounded up."""
        total = 0.0
        for layer in layers:
            key = layer.key(widths)
            found = self.table.resolve(key) if key in self.table.by_key or layer in self._rounded else None
            if found is None:
                return None
            total += self.table.by_key[found].latency_ms
        return total


def table_covers(trace: NetworkTrace, table: LatencyTable) -> bool:
    """Whether a table can predict the unpruned network."""
    return not table.missing(layer.key(trace.base_widths) for layer in timed_layers(trace, table.dtype))


__all__ = ["LatencyCost", "LayerSides", "TableError", "op_key", "table_covers", "timed_layers"]
