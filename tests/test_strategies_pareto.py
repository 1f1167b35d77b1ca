"""The Pareto front against its definition, and its picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diplugin.errors import DataError, UserError
from diplugin.strategies.pareto import Outcome, best_outcome, pareto_front, pareto_picture

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def outcomes(points: list[tuple[int, int]]) -> list[Outcome]:
    return [Outcome(str(i), accuracy / 10, float(cost)) for i, (accuracy, cost) in enumerate(points)]


@given(POINTS)
def test_nothing_beats_the_front_and_the_front_beats_the_rest(points: list[tuple[int, int]]) -> None:
    tried = outcomes(points)
    front = pareto_front(tried)

    def beats(a: Outcome, b: Outcome) -> bool:
        return a.accuracy >= b.accuracy and a.cost <= b.cost and (a.accuracy, a.cost) != (b.accuracy, b.cost)

    assert not any(beats(a, b) for a in tried for b in front)
    seen = {(o.accuracy, o.cost) for o in front}
    assert all((o.accuracy, o.cost) in seen or any(beats(a, o) for a in front) for o in tried)
    assert [o.cost for o in front] == sorted({o.cost for o in front})


def test_the_best_is_the_most_accurate_within_the_limit() -> None:
    tried = outcomes([(9, 5), (7, 2), (7, 1), (8, 3)])
    assert best_outcome(tried).name == "0"
    assert best_outcome(tried, limit=2.5).name == "2"
    with pytest.raises(DataError, match=r"within 0.5, none of 4 is"):
        best_outcome(tried, limit=0.5)
    with pytest.raises(DataError, match="got none"):
        best_outcome([])


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_picture_is_drawn(tmp_path: Path, ending: str, magic: bytes) -> None:
    base = Outcome("base", 1.0, 9.0)
    path = pareto_picture(outcomes([(9, 5), (7, 2)]), tmp_path / f"p.{ending}", "latency, ms", base)
    assert path.read_bytes().startswith(magic)


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in a folder that exists"):
        pareto_picture(outcomes([(9, 5)]), tmp_path / "missing" / "p.png", "ms")
    with pytest.raises(DataError, match="outcomes to draw"):
        pareto_picture([], tmp_path / "p.png", "ms")


@given(POINTS, st.permutations([(math.nan, 0.0), (1.0, math.nan), (math.nan, math.nan), (math.nan, 3.0)]), st.data())
def test_trials_that_came_to_nothing_change_nothing(
    points: list[tuple[int, int]], failed: list[tuple[float, float]], data: st.DataObject
) -> None:
    """Wherever among the others they stand."""
    tried = outcomes(points)
    mixed = [*tried]
    for accuracy, cost in failed:
        mixed.insert(data.draw(st.integers(0, len(mixed))), Outcome("failed", accuracy, cost))
    assert pareto_front(mixed) == pareto_front(tried)
    assert best_outcome(mixed) == best_outcome(tried)
    with pytest.raises(DataError, match="got none"):
        best_outcome([o for o in mixed if o.name == "failed"])
