"""Numbers as people read them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from diplugin.report.format import (
    change,
    percent,
    scaled,
    seconds,
    signed_percent,
    significant,
    tick_labels,
    value,
    words,
)
from diplugin.report.svg import shortened, ticks


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("key", "number", "text"),
    [
        ("macs", 40_551_424, "40.6 M"), ("macs", 999_999_999, "1.00 G"), ("macs", 0, "0"), ("macs", 9999, "9,999"),
        ("macs", 10_000, "10.0 k"), ("params", 269_722, "270 k"), ("accuracy", 1.0, "100.00 %"),
        ("latency_ms_measured", 12.345, "12.3 ms"), ("latency_ms_predicted", 0.04321, "0.0432 ms"),
        ("size_mb", 1.0, "1.00 MB"), ("onnx_max_abs_difference", 0, "0.0e+00"), ("teacher_accuracy", 0.5, "50.00 %"),
        ("warmup_s", 3, "3.00 s"), ("energy", 1_500_000, "1.50 M"), ("accuracy", None, "–"),
    ],
)  # fmt: skip
def test_values_carry_their_unit(key: str, number: float | None, text: str) -> None:
    assert plain(value(key, number)) == text


def test_changes_carry_their_sign() -> None:
    assert plain(change("accuracy", 0.9, 0.9)) == "±0 points"
    assert plain(change("latency_ms_measured", 2.0, 3.0)) == "+50.0 %"
    assert change("macs", 0, 3) == change("macs", None, 3) == change("macs", 3, None) == "–"
    assert plain(signed_percent(-0.00001)) == "±0 %"
    assert plain(percent(-0.5, 0)) == "−50 %"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0.00 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (99.96, "1 min 40 s"),
        (245, "4 min 05 s"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_grow_in_unit(number: float, text: str) -> None:
    assert plain(seconds(number)) == text


def test_scaling_never_shows_a_thousand_of_a_smaller_unit() -> None:
    for exponent in range(4, 14):
        assert "1,000" not in scaled(10.0**exponent * 0.99999)
    assert significant(0.00001234) == "1.2e-05"


def test_ticks_lie_within_and_step_evenly() -> None:
    for low, high in [(0, 1), (0.37, 0.98), (-3, 5), (0.00012, 0.00019), (0, 1234567)]:
        marks = ticks(low, high)
        assert 2 <= len(marks) <= 12 and low <= marks[0] + 1e-9 and marks[-1] <= high * (1 + 1e-9)
        steps = {round((b - a) / (marks[1] - marks[0]), 6) for a, b in pairwise(marks)}
        assert steps == {1.0}
        assert [float(t.replace(",", "").replace("−", "-")) for t in tick_labels(marks)] == pytest.approx(marks)
    assert ticks(2, 2) == [2] and tick_labels([0]) == ["0"]


def test_names_are_spelled_and_cut_at_the_front() -> None:
    assert words("latency_table · sha256") == "Latency table · SHA-256"
    assert shortened("layer3.2.conv1", 20) == "layer3.2.conv1"
    assert shortened("backbone.layer3.2.conv1", 15) == "…layer3.2.conv1"
