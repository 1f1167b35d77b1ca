"""Pictures with two axes: the search's path, accuracy against cost, prediction against stopwatch, and LDA's verdict.

Every function turns a `Run` into one `Drawing`, or None where the run has nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from .format import percent, quantity, tick_labels, value
from .run import Run
from .svg import SERIES, WIDTH, Axis, Drawing, shortened, ticks

#: Costs beyond this, of the unpruned network's, are nothing to draw.
_LARGEST_SHARE = 1e6


def _marks(low: float, high: float, about: int) -> list[tuple[float, str]]:
    marks = ticks(low, high, about)
    return list(zip(marks, tick_labels(marks), strict=True))


def search_path(run: Run) -> Drawing | None:
    """Label information given up against what every cost came down to, step by step, with the budgets."""
    points = run.plan.path
    costs = _path_costs(run)
    if len(points) < 2 or not costs:
        return None
    height, left, right, top, bottom = 318, 58, 24, 58, 46
    drawing = Drawing(WIDTH, height, "Label information given up against cost on the search's path")
    shares = {cost: [p.costs[cost] / run.plan.costs[cost].base for p in points] for cost in costs}
    most = max([1.0, *(max(s) for s in shares.values())])
    budgets = {b.cost: b.asked / run.plan.costs[b.cost].base for b in run.budgets if b.cost in costs}
    asked = {cost: share for cost, share in budgets.items() if 0 <= share <= most}  # others lie beyond the axis
    least = min([*(min(s) for s in shares.values()), *asked.values()])
    x = Axis(most, max(0.0, least - 0.05 * (most - least)), left, WIDTH - right)
    y = Axis(0, max(p.loss for p in points) * 1.08 or 1.0, height - bottom, top)
    for mark, words in _marks(0, y.high, 5):
        drawing.line(left, y(mark), WIDTH - right, y(mark))
        drawing.text(left - 8, y(mark) + 4, words, "soft small", "end")
    for mark in ticks(x.high, x.low, 6):
        drawing.text(x(mark), height - bottom + 17, percent(mark, 0), "soft small", "middle")
    drawing.text(left, height - 8, "Cost left, of the unpruned network", "soft small")
    drawing.text(0, 14, "Label information given up (sum of DI losses)", "soft small")
    legend = _legend(drawing, [(colour, quantity(cost).name) for colour, cost in zip(SERIES, costs, strict=False)], 32)
    if asked:
        drawing.line(legend, 28, legend + 16, 28, "soft", 1.2, dashed=True)
        drawing.text(legend + 22, 32, "budget", "small")
    for colour, cost in zip(SERIES, costs, strict=False):
        if cost in asked:
            drawing.line(x(asked[cost]), top, x(asked[cost]), height - bottom, colour, 1.2, dashed=True)
        drawing.path([(x(s), y(p.loss)) for s, p in zip(shares[cost], points, strict=True)], colour)
        drawing.dot(x(shares[cost][-1]), y(points[-1].loss), 4, colour,
                    f"{quantity(cost).name}: {percent(shares[cost][-1])} of unpruned")  # fmt: skip
    return drawing


def _legend(drawing: Drawing, entries: Sequence[tuple[str, str]], baseline: float) -> float:
    """Strokes of (colour, words) and their words, in a line from the left; returns where the next may begin."""
    at = 0.0
    for colour, words in entries:
        drawing.line(at, baseline - 4, at + 16, baseline - 4, colour, 2.5)
        drawing.text(at + 22, baseline, words, "small")
        at += 44 + 6.8 * len(words)  # wide enough for every font that FONT names
    return at


def _path_costs(run: Run) -> list[str]:
    """Budgeted costs first, then the others, as far as the path and the plan know them; four at most."""
    bases = {name: cost.base for name, cost in run.plan.costs.items() if cost.base > 0}
    known = [c for c, base in bases.items()
             if all(abs(p.costs.get(c, math.inf)) / base < _LARGEST_SHARE for p in run.plan.path)]  # fmt: skip
    budgeted = [b.cost for b in run.budgets if b.cost in known]
    return (list(dict.fromkeys(budgeted)) or known)[: len(SERIES)]


def calibration(run: Run) -> Drawing | None:
    """Latency predicted against measured: the table's calibration nets, and this run's own two."""
    nets = calibration_points(run.table)
    own = [(s.name, s.get("latency_ms_predicted"), s.get("latency_ms_measured")) for s in run.stages]
    mine = [(name, p, m) for name, p, m in own if p is not None and p >= 0 and m is not None and m >= 0]
    if not nets and len(mine) < 2:
        return None
    size, left, bottom, top = 340, 50, 44, 24
    drawing = Drawing(size, size, "Latency predicted against measured")
    values = [v for p in nets for v in p] + [v for _, p, m in mine for v in (p, m)]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low or high)
    x = Axis(max(0.0, low - pad), high + pad, left, size - 14)
    y = Axis(x.low, x.high, size - bottom, top)
    for mark, words in _marks(x.low, x.high, 5):
        drawing.line(left, y(mark), size - 14, y(mark))
        drawing.text(left - 8, y(mark) + 4, words, "soft small", "end")
        drawing.text(x(mark), size - bottom + 16, words, "soft small", "middle")
    drawing.line(x(x.low), y(x.low), x(x.high), y(x.high), "gone", 1, dashed=True)
    for predicted, measured in nets:
        drawing.dot(x(predicted), y(measured), 3.5, "gone", f"predicted {predicted:.3g} ms, measured {measured:.3g} ms")
    for name, predicted, measured in mine:
        drawing.dot(x(predicted), y(measured), 5, "kept" if name != "base" else "second")
        right = x(predicted) < 250
        drawing.text(x(predicted) + (9 if right else -9), y(measured) + 4, "unpruned" if name == "base" else name,
                     "strong small", "start" if right else "end")  # fmt: skip
    drawing.text(0, 12, "Measured, ms", "soft small")
    drawing.text(size - 14, size - 6, "Predicted by the table, ms", "soft small", "end")
    return drawing


def calibration_points(table: Mapping[str, object] | None) -> list[tuple[float, float]]:
    """(predicted, measured) of the table's nets, where the run recorded them."""
    rows = table.get("nets") if table else None
    points = []
    for row in rows if isinstance(rows, Sequence) else ():
        predicted, measured = (row.get("predicted_ms"), row.get("measured_ms")) if isinstance(row, Mapping) else (0, 0)
        if isinstance(predicted, (int, float)) and isinstance(measured, (int, float)) and measured > 0:
            points.append((float(predicted), float(measured)))
    return points


def journey(run: Run) -> Drawing | None:
    """Accuracy of every stage against its cost: down to the budget, then back up in recovery."""
    costs = ("latency_ms_measured", "latency_ms_predicted", "size_mb", "macs")
    cost = next((c for c in costs if run.base.get(c) is not None and run.last(c) is not None), None)
    if cost is None:
        return None
    # Recovery changes weights, not structure: the recovered network's cost is the pruned one's too.
    shared = run.last(cost, quantized=False)
    points = [(s.name, s.get(cost) if s.get(cost) is not None else shared, s.get("accuracy")) for s in run.stages]
    known = [(n, c, a) for n, c, a in points if c is not None and c >= 0 and a is not None and 0 <= a <= 1]
    if len(known) < 2:
        return None
    height, left, bottom, top = 220, 58, 44, 24
    drawing = Drawing(WIDTH, height, "Accuracy against cost, stage by stage")
    amounts, rates = [c for _, c, _ in known], [a for _, _, a in known]
    x = Axis(0, max(amounts) * 1.12, left, WIDTH - 10)
    pad = max(0.005, 0.25 * (max(rates) - min(rates)))
    y = Axis(max(0.0, min(rates) - pad), min(1.0, max(rates) + pad), height - bottom, top)
    for mark, words in _marks(100 * y.low, 100 * y.high, 4):
        drawing.line(left, y(mark / 100), WIDTH - 10, y(mark / 100))
        drawing.text(left - 8, y(mark / 100) + 4, words, "soft small", "end")
    unit = quantity(cost).unit
    for mark, words in _marks(x.low, x.high, 6) if unit else [(m, value(cost, m)) for m in ticks(x.low, x.high, 6)]:
        drawing.text(x(mark), height - bottom + 16, words, "soft small", "middle")
    drawing.path([(x(c), y(a)) for _, c, a in known], "gone", 1.5)
    for name, c, a in known:
        drawing.dot(x(c), y(a), 5, "second" if name == "base" else "kept", f"{name}: {percent(a, 2)}")
        if name == "base":
            drawing.text(x(c) + 10, y(a) + 4, "unpruned", "strong small")
        else:
            drawing.text(x(c), y(a) + (18 if name == "pruned" else -10), name, "strong small", "middle")
    drawing.text(0, 12, "Accuracy, %", "soft small")
    drawing.text(WIDTH - 10, height - 6, quantity(cost).name + (f", {unit}" if unit else ""), "soft small", "end")
    return drawing


_ORDERS: tuple[str, ...] = ("DI", "DI, eliminated", "L1", "variance", "random")


def validation(run: Run) -> Drawing | None:
    """Accuracy of linear discriminant analysis on the channels that each criterion keeps, a panel a layer."""
    layers = [(name, curves) for name, curves in map(_lda_curves, validated_layers(run)) if curves]
    if not layers:
        return None
    width, height, columns, head = 370, 190, 2, 28
    lines = -(-len(layers) // columns)
    drawing = Drawing(WIDTH, head + height * lines, "Accuracy of linear discriminant analysis on the channels kept")
    names = [n for n in _ORDERS if any(n in curves for _, curves in layers)]
    colours: dict[str, str] = dict(zip(_ORDERS, (*SERIES, "gone"), strict=True))
    _legend(drawing, [(colours[name], name) for name in names], 14)
    for i, (layer, curves) in enumerate(layers):
        _lda_panel(drawing, layer, curves, colours, i % columns * (WIDTH - width), head + i // columns * height, width)
    return drawing


def _lda_panel(
    drawing: Drawing, layer: str, curves: Mapping[str, Sequence[tuple[float, float]]], colours: Mapping[str, str],
    left: float, top: float, width: float,
) -> None:  # fmt: skip
    points = [point for curve in curves.values() for point in curve]
    counts, rates = [c for c, _ in points], [100 * a for _, a in points]
    x = Axis(0, max(counts), left + 34, left + width - 6)
    pad = max(0.5, 0.1 * (max(rates) - min(rates)))
    y = Axis(max(0.0, min(rates) - pad), min(100.0, max(rates) + pad), top + 150, top + 24)
    drawing.text(left, top + 12, shortened(layer, 30), "strong small", title=layer)
    drawing.text(left + width - 6, top + 12, "accuracy, %, by channels kept", "soft small", "end")
    for mark, words in _marks(y.low, y.high, 4):
        drawing.line(x.start, y(mark), x.end, y(mark))
        drawing.text(x.start - 6, y(mark) + 4, words, "soft small", "end")
    for mark, words in _marks(0, x.high, 5):
        drawing.text(x(mark), top + 166, words, "soft small", "middle")
    for name in reversed([n for n in colours if n in curves]):
        drawing.path([(x(c), y(100 * a)) for c, a in curves[name]], colours[name], 2.2 if name == "DI" else 1.4)


def validated_layers(run: Run) -> list[Mapping[str, Any]]:
    """The layers of a `diplugin validate` record."""
    layers = run.validation.get("layers") if run.validation is not None else None
    return [layer for layer in layers if isinstance(layer, Mapping)] if isinstance(layers, list) else []


def _lda_curves(layer: Mapping[str, Any]) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """(name, criterion -> [(channels kept, accuracy)] with at least two points)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    rows = layer.get("accuracies")
    for row in rows if isinstance(rows, list) else ():
        kept, rate = (row.get("kept"), row.get("accuracy")) if isinstance(row, Mapping) else (None, None)
        if isinstance(kept, (int, float)) and isinstance(rate, (int, float)) and str(row.get("criterion")) in _ORDERS:
            curves.setdefault(str(row["criterion"]), []).append((float(kept), float(rate)))
    rising = {
        n: sorted(c) for n, c in curves.items() if len(c) > 1 and any(b[0] > a[0] for a, b in pairwise(sorted(c)))
    }
    return str(layer.get("layer", "")), rising
