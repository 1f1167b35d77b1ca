"""Plans: checked when made, equal after a round trip, and unmoved by hostile JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diplugin.errors import PlanError
from diplugin.network import TensorSpec
from diplugin.plan import PathPoint, PlannedCost, PruningPlan

PLAN = PruningPlan(
    kept={"a": (0, 2, 3), "b": (1,)},
    channels={"a": 4, "b": 2},
    costs={"macs": PlannedCost(100.0, 60.0)},
    inputs=(TensorSpec((1, 3, 8, 8)), TensorSpec((1, 5), "int64")),
    path=(PathPoint(0.0, {"macs": 100.0}), PathPoint(0.25, {"macs": 60.0})),
)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    channels = draw(st.dictionaries(st.text(max_size=8), st.integers(1, 20), max_size=5))
    kept = {
        name: tuple(sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))) for name, count in channels.items()
    }
    costs = draw(st.dictionaries(st.text(max_size=8), st.builds(PlannedCost, finite, finite), max_size=3))
    path = draw(
        st.lists(st.builds(PathPoint, finite, st.dictionaries(st.text(max_size=4), finite, max_size=2)), max_size=3)
    )
    shapes = st.lists(st.integers(1, 64), max_size=4).map(tuple)
    dtypes = st.sampled_from(["float32", "float16", "bfloat16", "int64"])
    inputs = draw(st.lists(st.builds(TensorSpec, shapes, dtypes), max_size=2))
    return PruningPlan(kept, channels, costs, tuple(inputs), tuple(path))


@given(plan=plans())
def test_json_round_trip(plan: PruningPlan) -> None:
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_save_and_load(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == PLAN


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "plan.json"):
        with pytest.raises(PlanError, match="can be written"):
            PLAN.save(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(text=st.text() | json_values.map(json.dumps))
def test_any_other_text_is_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        PruningPlan.from_json(text)
    assert "\n" not in str(caught.value)


@given(data=st.data(), value=json_values)
def test_one_broken_place_is_a_plan_error_or_a_sound_plan(data: st.DataObject, value: Any) -> None:
    """Any one value of a sound plan replaced by any JSON: read as a plan that can be written again, or refused."""
    broken = json.loads(PLAN.to_json())
    node: Any = broken
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
            node = node[key]
        else:
            break
    node[key] = value
    try:
        plan = PruningPlan.from_json(json.dumps(broken))
    except PlanError as error:
        assert "\n" not in str(error)
    else:
        assert PruningPlan.from_json(plan.to_json()) == plan
        assert all(0 <= i < plan.channels[n] for n, kept in plan.kept.items() for i in kept)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("costs", "macs", "base"), 10**400),
        (("costs", "macs", "base"), float("nan")),
        (("costs", "macs", "predicted"), float("inf")),
        (("path", 0, "loss"), float("nan")),
        (("inputs", 0, "dtype"), "load"),
        (("inputs", 0, "dtype"), "no_such_type"),
        (("inputs", 0, "shape"), [1, -3]),
        (("inputs", 0, "shape"), "123"),
        (("groups", "a", "kept"), []),
        (("groups", "a", "kept"), [0, 0]),
        (("groups", "a", "kept"), [2, 1]),
        (("groups", "a", "kept"), [0, 4]),
        (("groups", "a", "kept"), [-1, 0]),
        (("groups", "a", "kept"), [True, 2]),
        (("groups", "a", "kept"), [0.0, 2.0]),
        (("groups", "a", "kept"), "02"),
        (("groups", "a", "channels"), -4),
        (("groups", "a", "channels"), "4"),
        (("groups", "a", "channels"), 10**400),
        (("groups",), []),
        (("schema",), 2),
        (("schema",), None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_hostile_values_are_refused(where: tuple[Any, ...], value: Any) -> None:
    data: Any = json.loads(PLAN.to_json())
    node = data
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    with pytest.raises(PlanError):
        PruningPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("key", ["schema", "inputs", "costs", "groups", "path"])
def test_a_missing_field_is_refused(key: str) -> None:
    data = json.loads(PLAN.to_json())
    del data[key]
    with pytest.raises(PlanError):
        PruningPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[" * 100_000, "nul", '{"schema": 1', "1" * 5000, "\ud800"])
def test_text_that_does_not_parse(text: str) -> None:
    with pytest.raises(PlanError):
        PruningPlan.from_json(text)


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "binary"):
        with pytest.raises(PlanError, match="expected a pruning plan at"):
            PruningPlan.load(path)


@pytest.mark.parametrize("kept", [(), (0, 0), (1, 0), (4,), (-1,)])
def test_a_plan_is_checked_when_made(kept: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="ascending channel numbers"):
        PruningPlan({"a": kept}, {"a": 4})


def test_both_mappings_name_the_same_groups() -> None:
    with pytest.raises(PlanError, match="'b'"):
        PruningPlan({"a": (0,), "b": (0,)}, {"a": 4})


def test_a_plan_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.kept = {}  # type: ignore[misc]


def test_widths_and_removed() -> None:
    assert PLAN.widths == {"a": 3, "b": 1}
    assert PLAN.removed == {"a": (1,), "b": (0,)}
    assert PLAN.costs["macs"].fraction == 0.6
    assert PlannedCost(0.0, 0.0).fraction == 0.0


def test_one_plan_after_another_speaks_of_the_first_network() -> None:
    later = PruningPlan({"a": (0, 2), "b": (0,)}, {"a": 3, "b": 1}, {"macs": PlannedCost(60.0, 30.0)})
    both = PLAN.then(later)
    assert both.kept == {"a": (0, 3), "b": (1,)}
    assert both.channels == PLAN.channels
    assert both.costs["macs"] == PlannedCost(100.0, 30.0)
    assert both.inputs == PLAN.inputs


def test_a_later_plan_for_another_network_is_refused() -> None:
    with pytest.raises(PlanError, match="widths differ"):
        PLAN.then(PLAN)


def test_merge_keeps_what_both_keep() -> None:
    other = PruningPlan({"a": (1, 2, 3), "c": (0,)}, {"a": 4, "c": 3})
    assert PLAN.merge(other).kept == {"a": (2, 3), "b": (1,), "c": (0,)}
    with pytest.raises(PlanError, match="different sizes"):
        PLAN.merge(PruningPlan({"a": (0,)}, {"a": 5}))
    with pytest.raises(PlanError):
        PLAN.merge(PruningPlan({"b": (0,)}, {"b": 2}))


def test_diff_names_the_widths_on_both_sides() -> None:
    other = PruningPlan({"a": (0, 1, 2), "c": (0,)}, {"a": 4, "c": 3})
    assert PLAN.diff(other) == {"b": (1, 0), "c": (0, 1)}
    assert PLAN.diff(PLAN) == {}
