"""The evidence as one picture: what the channels are worth that each criterion keeps, and DI along two orders.

The first row is the verdict, averaged over all layers; below it every layer has its two panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..plots import check_place, check_plot_file, new_figure, save_figure
from .study import FRACTIONS, LayerValidation, mean_accuracies

_STYLES = {
    "DI": ("#c0392b", "-", 2.2),
    "DI, eliminated": ("#e67e22", "-", 1.6),
    "L1": ("#2471a3", "--", 1.4),
    "variance": ("#1e8449", "--", 1.4),
    "random": ("#7f8c8d", ":", 1.4),
}
_OTHER = ("#34495e", "-.", 1.2)


def check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    """Refuse files that could not be written, before any work is done.

    Raises:
        UserError: no such folder, a file that cannot be written, or a plot of an unknown kind.
    """
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"expected {json_file} in a folder that exists, {json_file.parent} does not: make it first")
    if json_file is not None:
        check_place(json_file)
    if plot_file is not None:
        check_plot_file(plot_file)


def plot_validation(layers: Sequence[LayerValidation], path: Path) -> None:
    """Write the picture to `path` (PNG, SVG or PDF by its suffix).

    Raises:
        UserError: the name is of no such file, or it cannot be written.
    """
    beside = 1 if len(layers) <= 4 else 2
    rows = -(-len(layers) // beside)
    figure = new_figure(6.5 * beside + 1.5, 3.0 + 2.1 * rows)
    verdict, detail = figure.subfigures(2, 1, height_ratios=[3.0, 2.1 * rows])
    _draw_verdict(verdict.subplots(1, 2), layers)
    axes = detail.subplots(rows, 2 * beside, squeeze=False)
    for place, layer in enumerate(layers):
        # Down the first pair of columns, then down the second: layers keep their order within a column.
        row, pair = place % rows, place // rows
        left, right = axes[row][2 * pair], axes[row][2 * pair + 1]
        _draw_layer(left, right, layer)
        if row == rows - 1 or place == len(layers) - 1:
            left.set_xlabel("channels kept")
            right.set_xlabel("channels")
    for unused in range(len(layers), rows * beside):
        for column in (2 * (unused // rows), 2 * (unused // rows) + 1):
            axes[unused % rows][column].set_axis_off()
    save_figure(figure, path)


def _draw_verdict(axes: Any, layers: Sequence[LayerValidation]) -> None:
    """Mean accuracy over the layers, and what each criterion gains over random channels."""
    means = mean_accuracies(layers)
    percents = [100 * fraction for fraction in FRACTIONS]
    for criterion, accuracies in means.items():
        colour, line, width = _STYLES.get(criterion, _OTHER)
        gains = [100 * (a - b) for a, b in zip(accuracies, means["random"], strict=True)]
        for axis, values in zip(axes, ([100 * a for a in accuracies], gains), strict=True):
            axis.plot(percents, values, line, color=colour, lw=width, marker="o", ms=3, label=criterion)
    worst = max(layer.worst_difference for layer in layers)
    axes[0].set(title=f"mean of {len(layers)} layers", ylabel="LDA accuracy, held out (%)")
    axes[1].set(title=f"DI and scikit-learn differ by {worst:.0e} at most", ylabel="gain over random (points)")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xlabel("channels kept (%)")
        _plain(axis)


def _draw_layer(left: Any, right: Any, layer: LayerValidation) -> None:
    for criterion in dict.fromkeys(row.criterion for row in layer.accuracies):
        found = [row for row in layer.accuracies if row.criterion == criterion]
        colour, line, width = _STYLES.get(criterion, _OTHER)
        left.plot([row.kept for row in found], [100 * row.accuracy for row in found], line, color=colour,
                  lw=0.8 * width, marker="o", ms=2)  # fmt: skip
    left.set_title(layer.layer, fontsize=9, loc="left")
    left.set_ylabel("accuracy (%)", fontsize=8)
    right.plot(layer.counts, layer.greedy_order, color="#c0392b", lw=1.4)
    right.plot(layer.counts, layer.random_order, ":", color="#7f8c8d", lw=1.4)
    right.set_ylim(bottom=0)
    right.set_title("DI: best first, random", fontsize=8, loc="left", color="0.35")
    for axis in (left, right):
        _plain(axis)
        axis.tick_params(labelsize=7)


def _plain(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
