"""The evidence as one picture: accuracy against channels kept, and DI along two orders, a row a layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .study import LayerValidation

PICTURES = (".png", ".svg", ".pdf")
_STYLES = {
    "DI": ("#c0392b", "-", 2.2),
    "DI, eliminated": ("#e67e22", "-", 1.6),
    "L1": ("#2471a3", "--", 1.4),
    "variance": ("#1e8449", "--", 1.4),
    "random": ("#7f8c8d", ":", 1.4),
}


def check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    """Refuse files that could not be written, before any work is done.

    Raises:
        UserError: no such folder, or a picture of an unknown kind.
    """
    for file in (json_file, plot_file):
        if file is not None and not file.parent.is_dir():
            raise UserError(f"expected {file} in a folder that exists, {file.parent} does not: make it first")
    if plot_file is not None and plot_file.suffix.lower() not in PICTURES:
        raise UserError(f"expected a picture's name to end in {', '.join(PICTURES)}, got {plot_file.name!r}")


def plot_validation(layers: Sequence[LayerValidation], path: Path) -> None:
    """Write the picture to `path` (PNG, SVG or PDF by its suffix)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(layers), 2, squeeze=False)
    for (left, right), layer in zip(axes, layers, strict=True):
        criteria = list(dict.fromkeys(row.criterion for row in layer.accuracies))
        for criterion in criteria:
            rows = [row for row in layer.accuracies if row.criterion == criterion]
            colour, line, width = _STYLES.get(criterion, ("#34495e", "-.", 1.2))
            left.plot(
                [row.kept for row in rows],
                [100 * row.accuracy for row in rows],
                line,
                color=colour,
                lw=width,
                marker="o",
                ms=3,
                label=criterion,
            )
        left.set(title=layer.layer, xlabel="channels kept", ylabel="LDA accuracy, held out (%)")
        right.plot(layer.counts, layer.greedy_order, color="#c0392b", marker="o", ms=3, label="greedy order")
        right.plot(layer.counts, layer.random_order, ":", color="#7f8c8d", marker="o", ms=3, label="random order")
        right.set(
            title=f"differs from scikit-learn by {layer.worst_difference:.0e}", xlabel="channels", ylabel="DI / ‖Y‖²"
        )
        right.set_ylim(bottom=0)
        for axis in (left, right):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
