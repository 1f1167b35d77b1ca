"""Separable costs: sums of remembered terms equal the sum computed afresh."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diplugin.costs import CostModel, SeparableCost, Term, Widths

NAMES = ("a", "b", "c")
BASE = dict.fromkeys(NAMES, 8)
widths_of = st.fixed_dictionaries({name: st.integers(1, 8) for name in NAMES})
#: (groups, weight): a term is its weight times the product of its groups' widths.
terms_of = st.lists(st.tuples(st.lists(st.sampled_from(NAMES), max_size=3), st.integers(0, 9)), max_size=6)


def product(groups: list[str], weight: int, widths: Widths) -> float:
    value = float(weight)
    for group in groups:
        value *= widths[group]
    return value


def separable(described: list[tuple[list[str], int]]) -> SeparableCost:
    terms = [Term(tuple(g), lambda w, g=g, k=k: product(g, k, w)) for g, k in described]
    return SeparableCost("work", "", BASE, terms)


@given(described=terms_of, steps=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 8)), max_size=12))
def test_changes_add_up_to_the_cost(described: list[tuple[list[str], int]], steps: list[tuple[str, int]]) -> None:
    cost, widths = separable(described), dict(BASE)
    total = cost.base
    for group, width in steps:
        before = dict(widths)
        change = cost.change(widths, group, width)
        assert widths == before, "a question must not change the widths"
        total += change
        widths[group] = width
        assert total == cost.cost(widths) == sum(product(g, k, widths) for g, k in described)


@given(described=terms_of, widths=widths_of, group=st.sampled_from(NAMES), width=st.integers(1, 8))
def test_only_neighbours_matter_to_a_change(
    described: list[tuple[list[str], int]], widths: dict[str, int], group: str, width: int
) -> None:
    cost = separable(described)
    near = cost.neighbours(group)
    elsewhere = {**{name: 1 for name in NAMES if name not in near}}
    assert cost.change(widths, group, width) == cost.change({**widths, **elsewhere}, group, width)


def test_a_term_is_computed_once_per_width() -> None:
    asked: list[int] = []

    def value(widths: Widths) -> float:
        asked.append(widths["a"])
        return 2.0 * widths["a"]

    cost = SeparableCost("work", "", BASE, [Term(("a",), value)])
    for width in (8, 4, 8, 4, 8):
        cost.cost({**BASE, "a": width})
    assert asked == [8, 4]


def test_a_group_that_no_term_mentions_costs_nothing() -> None:
    cost = separable([(["a"], 3)])
    assert cost.change(BASE, "b", 1) == 0
    assert cost.neighbours("b") == {"b"}


def test_no_terms_cost_nothing() -> None:
    assert separable([]).base == 0


def test_a_group_that_stands_twice_in_a_term_counts_once() -> None:
    cost = separable([(["a", "a"], 1)])
    assert cost.base == 64
    assert cost.change(BASE, "a", 4) == 16 - 64


def test_it_is_a_cost_model() -> None:
    assert isinstance(separable([]), CostModel)


def test_an_unknown_width_is_no_silent_zero() -> None:
    with pytest.raises(KeyError):
        separable([(["a"], 3)]).cost({"b": 3})
