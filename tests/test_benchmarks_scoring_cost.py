"""The benchmark of scoring's cost, without the long runs: what it makes of the figures."""

from __future__ import annotations

import argparse
import math

import pytest
import scoring_cost


def test_a_contender_alone_is_still_compared_with_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"forward": 200.0, "DI": 210.0}
    monkeypatch.setattr(
        scoring_cost, "measure", lambda name, _: {"cpu_s": 1.0, "peak_mb": peaks[name], "time_ratio": 1.2}
    )
    rows = scoring_cost.measure_all(["DI"], argparse.Namespace(rounds=2))
    assert [row["name"] for row in rows] == ["forward", "DI"]
    assert rows[1]["memory_ratio"] == pytest.approx(1.05)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
