"""The pictures of a run: what stayed of every layer, what the search gave up for it, and where the time went.

Every function turns a `Run` into one `Drawing`, or None where the run has nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .format import percent, quantity, seconds, tick_labels, value
from .run import Run
from .svg import SERIES, Axis, Drawing, shortened, ticks

WIDTH = 760
_NAME_CHARACTERS = 28


def structure(run: Run) -> Drawing | None:
    """A row a channel group: channels kept within the unpruned ones, the DI of its features, the score that stays."""
    plan = run.plan
    if not plan.channels:
        return None
    names = list(plan.channels)
    row = 22 if len(names) <= 40 else 18
    top, name_width, bar_width = 30, 190, 290
    di_start, share_end = name_width + bar_width + 100, WIDTH - 2
    drawing = Drawing(WIDTH, top + row * len(names) + 8, "Channels kept and discriminant information of every layer")
    scale = Axis(0, max(plan.channels.values()), 0, bar_width)
    di_axis = Axis(0, 1, di_start, di_start + 90)
    scored = run.scores is not None and bool(run.scores.di)
    drawing.text(0, 14, "Layer", "soft small")
    drawing.text(name_width, 14, "Channels kept of the unpruned ones", "soft small")
    if scored:
        drawing.text(di_axis(0), 14, "DI, 0 to 1", "soft small")
        drawing.text(share_end, 14, "Score kept", "soft small", "end")
        for mark in (0, 0.5, 1):
            drawing.line(di_axis(mark), top - 8, di_axis(mark), drawing.height - 8)
    for i, name in enumerate(names):
        y = top + row * i
        middle, kept, channels = y + row / 2 - 2, len(plan.kept[name]), plan.channels[name]
        drawing.text(0, middle + 4, shortened(name, _NAME_CHARACTERS), title=name)
        hint = f"{name}: {kept} of {channels} channels kept"
        drawing.rect(name_width, middle - row * 0.32, scale(channels), row * 0.64, "track", hint)
        drawing.rect(name_width, middle - row * 0.32, scale(kept), row * 0.64, "kept", hint)
        drawing.text(name_width + scale(channels) + 8, middle + 4, f"{kept} / {channels}", "soft")
        if scored:
            _scored_row(drawing, run, name, middle, di_axis, share_end)
    return drawing


def _scored_row(drawing: Drawing, run: Run, name: str, y: float, axis: Axis, share_end: float) -> None:
    assert run.scores is not None
    di = run.scores.di.get(name)
    if di is not None:
        shown = axis(min(1.0, max(0.0, di)))
        drawing.line(axis(0), y, shown, y, "second", 2)
        drawing.dot(shown, y, 4, "second", f"{name}: DI {di:.3f}")
    share = kept_score(run, name)
    drawing.text(share_end, y + 4, percent(share, 0), "soft", "end")


def kept_score(run: Run, name: str) -> float | None:
    """Share of a group's summed channel scores that stays."""
    scores = run.scores.channels.get(name, ()) if run.scores is not None else ()
    total = sum(scores)
    if total <= 0 or len(scores) != run.plan.channels[name]:
        return None
    return sum(scores[i] for i in run.plan.kept[name]) / total


def channel_scores(run: Run) -> Drawing | None:
    """A row a group: every channel at its score, on one logarithmic axis; removed ones hollow."""
    if run.scores is None:
        return None
    rows = [(n, run.scores.channels[n]) for n in run.plan.channels
            if len(run.scores.channels.get(n, ())) == run.plan.channels[n]]  # fmt: skip
    positive = [s for _, scores in rows for s in scores if s > 0]
    if not positive:
        return None
    low, high = max(min(positive), max(positive) * 1e-8), max(positive)
    row, top, left = 22 if len(rows) <= 40 else 18, 30, 190
    axis = Axis(math.log10(low), math.log10(high), left + 8, WIDTH - 10)
    drawing = Drawing(WIDTH, top + row * len(rows) + 22, "Score of every channel, kept or removed")
    bottom = top + row * len(rows)
    for mark in _decades(axis.low, axis.high):
        x = axis(math.log10(mark))
        drawing.line(x, top - 6, x, bottom)
        drawing.text(x, bottom + 15, f"{mark:g}" if mark >= 1e-4 else _power(mark), "soft small", "middle")
    drawing.dots([(left + 12, 10)], 3, "kept")
    drawing.text(left + 20, 14, "kept", "soft small")
    drawing.dots([(left + 62, 10)], 3, "gone", hollow=True)
    drawing.text(left + 70, 14, "removed", "soft small")
    for i, (name, scores) in enumerate(rows):
        y, kept = top + row * i + row / 2 - 2, set(run.plan.kept[name])
        drawing.text(0, y + 4, shortened(name, _NAME_CHARACTERS), title=name)
        radius = 3 if len(scores) <= 128 else 2
        for stays in (False, True):
            found = {round(axis(math.log10(max(s, low)))) for c, s in enumerate(scores) if (c in kept) == stays}
            drawing.dots([(x, y) for x in sorted(found)], radius, "kept" if stays else "gone", hollow=not stays)
    return drawing


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms, with 2 and 5 in between where there are few."""
    steps = (1,) if high - low > 3 else (1, 2, 5)
    marks = [m * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for m in steps]
    return [m for m in marks if low - 1e-9 <= math.log10(m) <= high + 1e-9]


def _power(mark: float) -> str:
    digits = str(round(math.log10(mark))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"


def _marks(low: float, high: float, about: int) -> list[tuple[float, str]]:
    marks = ticks(low, high, about)
    return list(zip(marks, tick_labels(marks), strict=True))


def search_path(run: Run) -> Drawing | None:
    """Label information given up against what every cost came down to, step by step, with the budgets."""
    points = run.plan.path
    costs = _path_costs(run)
    if len(points) < 2 or not costs:
        return None
    height, left, right, top, bottom = 300, 58, 24, 40, 46
    drawing = Drawing(WIDTH, height, "Label information given up against cost on the search's path")
    shares = {cost: [p.costs[cost] / run.plan.costs[cost].base for p in points] for cost in costs}
    asked = {b.cost: b.asked / run.plan.costs[b.cost].base for b in run.budgets if b.cost in costs}
    least = min([*(min(s) for s in shares.values()), *asked.values()])
    most = max([1.0, *(max(s) for s in shares.values())])
    x = Axis(most, max(0.0, least - 0.05 * (most - least)), left, WIDTH - right)
    y = Axis(0, max(p.loss for p in points) * 1.08 or 1.0, height - bottom, top)
    for mark, words in _marks(0, y.high, 5):
        drawing.line(left, y(mark), WIDTH - right, y(mark))
        drawing.text(left - 8, y(mark) + 4, words, "soft small", "end")
    for mark in ticks(x.high, x.low, 6):
        drawing.text(x(mark), height - bottom + 17, percent(mark, 0), "soft small", "middle")
    drawing.text(left, height - 8, "Cost left, of the unpruned network", "soft small")
    drawing.text(0, 14, "Label information given up (sum of DI losses)", "soft small")
    legend = WIDTH - right
    for colour, cost in reversed(list(zip(SERIES, costs, strict=False))):
        if cost in asked:
            drawing.line(x(asked[cost]), top, x(asked[cost]), height - bottom, colour, 1.2, dashed=True)
        drawing.path([(x(s), y(p.loss)) for s, p in zip(shares[cost], points, strict=True)], colour)
        drawing.dot(x(shares[cost][-1]), y(points[-1].loss), 4, colour,
                    f"{quantity(cost).name}: {percent(shares[cost][-1])} of unpruned")  # fmt: skip
        words = quantity(cost).name + (" (budget dashed)" if cost in asked else "")
        drawing.text(legend, 14, words, "small", "end")
        legend -= 6.1 * len(words) + 12
        drawing.line(legend - 8, 10, legend + 8, 10, colour, 2.5)
        legend -= 22
    return drawing


def _path_costs(run: Run) -> list[str]:
    """Budgeted costs first, then the others, as far as the path and the plan know them; four at most."""
    known = [c for c in run.plan.costs if run.plan.costs[c].base > 0 and all(c in p.costs for p in run.plan.path)]
    budgeted = [b.cost for b in run.budgets if b.cost in known]
    return (list(dict.fromkeys(budgeted)) or known)[: len(SERIES)]


def stage_seconds(run: Run) -> Drawing | None:
    """Where the run's time went, a bar a stage."""
    if not run.seconds:
        return None
    row, left = 22, 190
    drawing = Drawing(WIDTH, row * len(run.seconds) + 4, "Seconds per stage")
    scale = Axis(0, max(run.seconds.values()) or 1, 0, WIDTH - left - 90)
    for i, (name, spent) in enumerate(run.seconds.items()):
        middle = row * i + row / 2
        drawing.text(0, middle + 4, shortened(name, _NAME_CHARACTERS), title=name)
        drawing.rect(left, middle - 6, max(1.0, scale(spent)), 12, "kept")
        drawing.text(left + max(1.0, scale(spent)) + 8, middle + 4, seconds(spent), "soft")
    return drawing


def calibration(run: Run) -> Drawing | None:
    """Latency predicted against measured: the table's calibration nets, and this run's own two."""
    nets = calibration_points(run.table)
    own = [(s.name, s.get("latency_ms_predicted"), s.get("latency_ms_measured")) for s in run.stages]
    mine = [(name, p, m) for name, p, m in own if p is not None and m is not None]
    if not nets and len(mine) < 2:
        return None
    size, left, bottom, top = 340, 50, 44, 24
    drawing = Drawing(size, size, "Latency predicted against measured")
    values = [v for p in nets for v in p] + [v for _, p, m in mine for v in (p, m)]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low or high)
    x = Axis(max(0.0, low - pad), high + pad, left, size - 4)
    y = Axis(x.low, x.high, size - bottom, top)
    for mark, words in _marks(x.low, x.high, 5):
        drawing.line(left, y(mark), size - 4, y(mark))
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
    drawing.text(size - 4, size - 6, "Predicted by the table, ms", "soft small", "end")
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
    cost = next((c for c in ("latency_ms_measured", "latency_ms_predicted", "macs")
                 if run.base.get(c) is not None and run.last(c) is not None), None)  # fmt: skip
    if cost is None:
        return None
    # Recovery changes weights, not structure: the recovered network's cost is the pruned one's too.
    points = [(s.name, s.get(cost) if s.get(cost) is not None else run.last(cost), s.get("accuracy"))
              for s in run.stages]  # fmt: skip
    known = [(n, c, a) for n, c, a in points if c is not None and a is not None]
    if len(known) < 2:
        return None
    height, left, bottom, top = 220, 58, 44, 24
    drawing = Drawing(WIDTH, height, "Accuracy against cost, stage by stage")
    costs, rates = [c for _, c, _ in known], [a for _, _, a in known]
    x = Axis(0, max(costs) * 1.12, left, WIDTH - 10)
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
        drawing.text(x(c) + 10, y(a) + 4, "unpruned" if name == "base" else name, "strong small")
    drawing.text(0, 12, "Accuracy, %", "soft small")
    drawing.text(WIDTH - 10, height - 6, quantity(cost).name + (f", {unit}" if unit else ""), "soft small", "end")
    return drawing
