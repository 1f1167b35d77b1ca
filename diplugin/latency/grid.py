"""Which widths to profile: a grid for every channel group, and the operators that a layer can be on it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..costs.latency import LayerSides
from ..errors import TableError
from ..network import NetworkTrace
from ..tables import Alignment, OpKey


def width_grid(channels: int, alignment: Alignment, points: int = 8, blocks: int = 1) -> tuple[int, ...]:
    """Widths to profile for a group: aligned, on the plateau's edges where the group is wide, at most ~`points`.

    >>> width_grid(64, Alignment(4, 16)), width_grid(16, Alignment(4, 16))
    ((16, 32, 48, 64), (4, 8, 12, 16))

    Raises:
        TableError: no points at all.
    """
    if points < 1:
        raise TableError(f"expected 1 or more widths a channel group, got {points}; leave points out for 8")
    step = alignment.plateau
    while step > alignment.step and channels < 4 * step:
        step = max(alignment.step, step // 2)
    while channels > points * step:
        step += alignment.plateau if step >= alignment.plateau else step
    widths = {w for w in range(step, channels + 1, step) if w % blocks == 0}
    return tuple(sorted(widths | {channels}))


def group_grids(trace: NetworkTrace, alignment: Alignment, points: int = 8) -> dict[str, tuple[int, ...]]:
    """The width grid of every prunable group."""
    return {g.name: width_grid(g.channels, alignment, points, g.blocks) for g in trace.prunable}


def random_widths(grid: Mapping[str, Sequence[int]], draw: random.Random) -> dict[str, int]:
    """Widths of a random pruned net on the grid: around one density for the whole net, so that sizes spread out."""
    density = draw.uniform(0.2, 1.0)

    def pick(widths: Sequence[int]) -> int:
        wanted = widths[-1] * min(1.0, max(0.0, density + draw.uniform(-0.25, 0.25)))
        return min(widths, key=lambda w: abs(w - wanted))

    return {group: pick(widths) for group, widths in grid.items()}


def layer_keys(layer: LayerSides, grid: Mapping[str, Sequence[int]], base: Mapping[str, int]) -> Iterator[OpKey]:
    """Every key that a layer can have on the grid; sides that many groups share get a grid of their own."""
    yield layer.key(base)
    for inside in _side_widths(layer.inside, grid, base):
        for outside in _side_widths(layer.outside, grid, base):
            both = {**inside, **outside}
            if all(outside[g] == inside[g] for g in set(inside) & set(outside)):
                yield layer.key({**base, **both})


def _side_widths(side: Any, grid: Mapping[str, Sequence[int]], base: Mapping[str, int]) -> list[dict[str, int]]:
    """Assignments of the side's groups: one group over its grid, several of them all at the same density."""
    groups = [group for group, _ in side.parts]
    if len(groups) <= 1:
        return [{group: width} for group in groups for width in grid[group]] or [{}]
    longest = max(len(grid[group]) for group in groups)
    return [{g: grid[g][max(0, (i + 1) * len(grid[g]) // longest - 1)] for g in groups} for i in range(longest)]
