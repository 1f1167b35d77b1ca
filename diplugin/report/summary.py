"""A run in one picture, for a README: the figures before and after, and what was kept of every layer."""

from __future__ import annotations

from .format import change, quantity, value
from .rows import structure
from .run import Run
from .svg import WIDTH, Drawing

_FIGURES = ("accuracy", "macs", "params", "latency_ms_measured")


def summary(run: Run) -> Drawing | None:
    """Up to four figures side by side over the structure; None if the run measured none of them."""
    keys = [k for k in _FIGURES if run.base.get(k) is not None and run.last(k) is not None]
    rows = structure(run)
    if not keys or rows is None:
        return None
    margin, head, column = 24, 116, WIDTH / len(keys)
    drawing = Drawing(WIDTH + 2 * margin, head + rows.height + margin, "A pruned network beside the unpruned one")
    for i, key in enumerate(keys):
        x, before, after = margin + i * column, run.base.get(key), run.last(key)
        drawing.text(x, margin + 12, quantity(key).name, "soft")
        drawing.text(x, margin + 40, value(key, after), "large")
        drawing.text(x, margin + 62, f"from {value(key, before)}, {change(key, before, after)}", "soft")
    drawing.line(margin, margin + 84, WIDTH + margin, margin + 84)
    drawing.place(rows, margin, head)
    return drawing
