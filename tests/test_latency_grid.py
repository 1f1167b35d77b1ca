"""The widths that are profiled are aligned, bounded, and spread over small and large nets."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diplugin.errors import TableError
from diplugin.latency.grid import random_widths, width_grid
from diplugin.tables import Alignment


@given(
    channels=st.integers(1, 512),
    step=st.sampled_from([1, 2, 4, 8, 16]),
    ratio=st.sampled_from([1, 2, 4]),
    points=st.integers(2, 12),
)
def test_grids_are_aligned_bounded_and_hold_the_unpruned_width(
    channels: int, step: int, ratio: int, points: int
) -> None:
    grid = width_grid(channels, Alignment(step, step * ratio), points)
    assert grid == tuple(sorted(set(grid))) and grid[-1] == channels and grid[0] >= 1
    assert all(w % step == 0 for w in grid[:-1])
    assert len(grid) <= points + 1


@pytest.mark.parametrize("points", [0, -3])
def test_a_grid_without_points_is_refused(points: int) -> None:
    with pytest.raises(TableError, match="1 or more"):
        width_grid(64, Alignment(8, 8), points)


def test_grids_respect_the_blocks_of_grouped_convolutions() -> None:
    assert all(w % 6 == 0 for w in width_grid(48, Alignment(4, 4), 12, blocks=6))


def test_densities_of_random_nets_spread_out() -> None:
    grid, draw = {"a": (4, 8, 12, 16), "b": tuple(range(8, 129, 8))}, random.Random(0)
    totals = sorted(sum(random_widths(grid, draw).values()) for _ in range(30))
    assert totals[0] < 0.4 * 144 and totals[-1] > 0.9 * 144
