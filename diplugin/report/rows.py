"""Pictures with a row a layer or a stage: what stayed of every layer, every channel's score, where the time went.

Every function turns a `Run` into one `Drawing`, or None where the run has nothing to draw.
"""

from __future__ import annotations

import math
from itertools import groupby

from .format import percent, seconds
from .run import Run
from .svg import WIDTH, Axis, Drawing, shortened

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


def bit_map(run: Run) -> Drawing | None:
    """A row a quantized layer: the bits of every output channel, in the channels' order."""
    layers = _bits(run)
    if not layers:
        return None
    row, top, left, room = 22 if len(layers) <= 40 else 18, 30, 190, 470
    drawing = Drawing(WIDTH, top + row * len(layers) + 4, "Bits of every output channel of every quantized layer")
    scale = Axis(0, max(map(len, layers.values())), 0, room)
    widths = sorted({b for channels in layers.values() for b in channels}, reverse=True)
    for i, bits in enumerate(widths):
        drawing.rect(left + 72 * i, 5, 12, 12, "kept" if bits else "track", shade=_shade(bits))
        drawing.text(left + 72 * i + 18, 15, f"{bits} bits" if bits else "no weights", "soft small")
    drawing.text(WIDTH - 2, 15, "Mean", "soft small", "end")
    for i, (name, channels) in enumerate(layers.items()):
        middle, at = top + row * i + row / 2 - 2, 0
        drawing.text(0, middle + 4, shortened(name, _NAME_CHARACTERS), title=name)
        for bits, run_of in groupby(channels):
            count = len(list(run_of))
            x, width = left + scale(at), scale(count)
            drawing.rect(x, middle - row * 0.32, width, row * 0.64, "kept" if bits else "track",
                         f"{name}: {bits} bits", shade=_shade(bits))  # fmt: skip
            at += count
        drawing.text(WIDTH - 2, middle + 4, f"{sum(channels) / len(channels):.2f}", "soft", "end")
    return drawing


def _shade(bits: int) -> float:
    """Darker for more bits; 8 bits and more are the full colour."""
    return min(1.0, 0.16 + 0.84 * (bits / 8) ** 1.2) if bits else 1.0


def _bits(run: Run) -> dict[str, tuple[int, ...]]:
    layers = run.bits.get("bits") if run.bits is not None else None
    return {str(n): tuple(int(b) for b in widths) for n, widths in layers.items() if widths} if layers else {}
