"""Budgets: what the command line writes, and what means nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diplugin.costs import Budget, SeparableCost, Term
from diplugin.errors import BudgetError

MACS = SeparableCost("macs", "MAC", {"a": 4}, [Term(("a",), lambda w: 50.0 * w["a"])])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs=0.5", Budget("macs", fraction=0.5)),
        ("macs=1", Budget("macs", fraction=1.0)),
        ("macs=.25", Budget("macs", fraction=0.25)),
        ("macs = 5e-1 ", Budget("macs", fraction=0.5)),
        ("macs=60M", Budget("macs", limit=60e6)),
        ("macs=60m", Budget("macs", limit=60e6)),
        ("macs=1.5 G", Budget("macs", limit=1.5e9)),
        ("macs=0.5k", Budget("macs", limit=500.0)),
        ("params=200k", Budget("params", limit=200e3)),
        ("latency_ms=12ms", Budget("latency_ms", limit=12.0)),
        ("latency_ms=0.7ms", Budget("latency_ms", limit=0.7)),
        ("latency_ms=700us", Budget("latency_ms", limit=0.7)),
        ("latency_ms=0.012s", Budget("latency_ms", limit=12.0)),
        ("latency_ms=0.7", Budget("latency_ms", fraction=0.7)),
        ("memory_mb=2MB", Budget("memory_mb", limit=2.0)),
        ("memory_mb=512kb", Budget("memory_mb", limit=0.512)),
        ("size_mb=1GB", Budget("size_mb", limit=1000.0)),
    ],
)
def test_parse(text: str, expected: Budget) -> None:
    got = Budget.parse(text)
    assert (got.cost, got.fraction) == (expected.cost, expected.fraction)
    assert got.limit == (None if expected.limit is None else pytest.approx(expected.limit, rel=1e-15))


@pytest.mark.parametrize(
    "text",
    [
        "", "macs", "=0.5", "macs=", "macs=x", "macs=0", "macs=-1", "macs=-60M", "macs=0M", "macs=1.5", "macs=2",
        "macs=5000000",
        "latency_ms=12", "latency_ms=12M", "latency_ms=-3ms", "latency_ms=0ms", "macs=12ms", "memory_mb=2GHz",
        "speed=0.5", "MACS=0.5", "macs=nan", "macs=inf", "macs=1e999M", "macs=0.5=0.5", "macs=0,5", "macs=50%",
        "macs=60 M M", "macs=\n0.5\n0.5",
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@given(text=st.text(max_size=20) | st.text(max_size=12).map("macs={}".format))
def test_any_text_is_a_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError as error:
        assert "\n" not in str(error)
    else:
        assert (budget.fraction is None) != (budget.limit is None)
        assert 0 < (budget.fraction or budget.limit or 0) < math.inf


@pytest.mark.parametrize("value", [0.0, -0.5, 1.0001, math.nan, math.inf])
def test_fractions_lie_in_the_unit_interval(value: float) -> None:
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        Budget("macs", fraction=value)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_limits_are_positive_and_finite(value: float) -> None:
    with pytest.raises(BudgetError, match="positive limit"):
        Budget("latency_ms", limit=value)


def test_exactly_one_of_fraction_and_limit() -> None:
    for fraction, limit in ((None, None), (0.5, 5.0)):
        with pytest.raises(BudgetError, match="either a fraction or a limit"):
            Budget("macs", fraction=fraction, limit=limit)


def test_absolute() -> None:
    assert Budget("macs", fraction=0.25).absolute(MACS) == 50.0
    assert Budget("macs", limit=70.0).absolute(MACS) == 70.0


def test_text() -> None:
    assert str(Budget("macs", fraction=0.5)) == "macs <= 0.5 of the unpruned network"
    assert str(Budget("latency_ms", limit=12.0)) == "latency_ms <= 12"


def test_a_bare_number_above_one_asks_for_a_unit() -> None:
    with pytest.raises(
        BudgetError, match=r"fraction up to 1 or a number with a unit .ms, us, s. for latency_ms, got 12 without"
    ):
        Budget.parse("latency_ms=12")


@pytest.mark.parametrize("value", ["0.5", "60M", [0.5], 1j])
def test_what_is_no_number_is_refused(value: Any) -> None:
    for name in ("fraction", "limit"):
        with pytest.raises(BudgetError, match="expected a number for macs, got "):
            Budget("macs", **{name: value})
