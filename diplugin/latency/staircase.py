"""The staircase of a layer as a picture: latency against channels, one line for each width of the other side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import TableError
from ..plots import new_figure, save_figure
from ..tables import LatencyTable, OpKey


def staircases(table: LatencyTable) -> list[tuple[OpKey, list[OpKey]]]:
    """Families of operators in a table with their keys, the ones with most widths first."""
    families: dict[OpKey, list[OpKey]] = {}
    for key in sorted(table.by_key):
        families.setdefault(key.family, []).append(key)
    return sorted(families.items(), key=lambda item: (-len(item[1]), item[0]))


def choose(table: LatencyTable, words: Sequence[str] = ()) -> list[OpKey]:
    """The keys of the fullest family whose description holds all the words.

    Raises:
        TableError: no operator of the table is described so.
    """
    for _, keys in staircases(table):
        if all(any(word in key.text for key in keys) for word in words):
            return keys
    raise TableError(f"expected words that describe an operator of table {table.name!r}, got {' '.join(words)!r}; "
                     f"'diplugin tables show {table.name}' lists them")  # fmt: skip


def plot_staircase(table: LatencyTable, path: str | Path, words: Sequence[str] = ()) -> Path:
    """Draw one family of operators into a PNG, SVG or PDF file, as its name says; returns its path.

    Raises:
        TableError: no operator matches.
        UserError: the name is of no such file, or it cannot be written.
    """
    keys = choose(table, words)
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    lines: dict[int, list[OpKey]] = {}
    for key in keys:
        lines.setdefault(0 if key.depthwise else key.cin, []).append(key)
    shown = sorted(lines)[:: max(1, len(lines) // 6)]
    for cin in shown:
        points = sorted((key.cout, table.by_key[key].latency_ms * 1e3) for key in lines[cin])
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1,
                  label=f"{cin} channels in" if cin else "depthwise")  # fmt: skip
    example = keys[-1]
    axes.set_xlabel("channels out")
    axes.set_ylabel("latency, µs")
    axes.set_ylim(bottom=0)
    kind = "depthwise " if example.depthwise else ""
    kernel = "x".join(map(str, example.kernel)) or ""
    axes.set_title(f"{kind}{example.op} {kernel} at {'x'.join(map(str, example.size))}\n{table.device}, "
                   f"{table.setting.text}", fontsize=9)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)
