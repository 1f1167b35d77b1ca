"""The report of run folders that are hostile, broken, missing or full of any figures at all."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from report_pages import SVG, make, metrics, page_of, plan, steps

from diplugin.errors import PlanError
from diplugin.plan import PathPoint, PlannedCost, PruningPlan
from diplugin.report import figures, read_run, write_report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\x1b\x00\ud800{{ 7*7 }}"


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = PruningPlan({HOSTILE: (0, 1)}, {HOSTILE: 4}, {"macs": PlannedCost(10, 5)},
                          path=(PathPoint(0, {"macs": 10}), PathPoint(1, {"macs": 5})))  # fmt: skip
    figures_ = metrics()
    figures_["latency_table"] |= {"name": HOSTILE, "device": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}
    figures_ |= {"data": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "seconds": {HOSTILE: 1.0}, "seed": HOSTILE}
    figures_["budgets"].append({"cost": HOSTILE, "asked": 1, "predicted": 1, "measured": None, "met": None})
    figures_["base"][HOSTILE] = 3
    folder = make(
        tmp_path / "run", plan=hostile.to_json(), metrics=figures_, config={"model": HOSTILE, HOSTILE: [HOSTILE, {}]},
        scores={"di": {HOSTILE: 0.5}, "scores": {HOSTILE: [1, 2, 3, 4]}, "left_alone": {HOSTILE: HOSTILE}},
        validate={"layers": [{"layer": HOSTILE, "worst_difference": 1e-9, "non_decreasing": True}]},
    )  # fmt: skip
    page = page_of(folder)
    assert not [tag for tag, attrs in page.tags if tag in ("script", "img") or any(a.startswith("on") for a in attrs)]
    assert "<script>alert(1)</script>" in page.text and "{{ 7*7 }}" in page.text
    for path in figures(folder, tmp_path / "pictures"):
        assert not list(ElementTree.parse(path).iter(f"{SVG}script"))


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in metrics().items() if k != key}


BROKEN: dict[str, dict[str, Any]] = {
    "no metrics: the run was killed": {"metrics": None},
    "no plan": {"plan": None},
    "no config": {"config": None},
    "metrics cut short": {"metrics": json.dumps(metrics())[:-40]},
    "metrics is a list": {"metrics": []},
    "no unpruned figures": {"metrics": without("base")},
    "a number beyond all floats": {"metrics": metrics() | {"pruned": {"macs": 10**400}}},
    "a stage is a list": {"metrics": metrics() | {"pruned": [1]}},
    "an accuracy that is infinite": {"metrics": '{"base": {"accuracy": Infinity}}'},
    "a budget without a limit": {"metrics": metrics() | {"budgets": [{"cost": "macs"}]}},
    "a budget in words": {"metrics": metrics() | {"budgets": ["macs=0.5"]}},
    "a budget neither met nor missed": {"metrics": metrics() | {"budgets": [{"cost": "macs", "asked": 1, "met": "y"}]}},
    "seconds in words": {"metrics": metrics() | {"seconds": {"score": "long"}}},
    "versions as a list": {"metrics": metrics() | {"versions": ["2.13"]}},
    "a plan cut short": {"plan": plan().to_json()[:60]},
    "a plan that keeps what is not there": {"plan": plan().to_json().replace('"channels": 8', '"channels": 2')},
    "a version beyond all floats": {"metrics": metrics() | {"versions": {"torch": 10**400}}},
    "a calibration beyond all floats": {
        "metrics": metrics() | {"latency_table": {"nets": [{"predicted_ms": 10**400, "measured_ms": 1}]}}
    },
    "a plan of more channels than all floats": {
        "plan": plan().to_json().replace('"channels": 8', f'"channels": {10**400}')
    },
    "scores in words": {"scores": {"scores": {"stem": ["high"]}}},
    "scores cut short": {"scores": "{"},
    "bits in words": {"bits": {"version": 1, "bits": {"stem": ["eight"]}}},
    "bits without a list": {"bits": {"version": 1, "bits": {"stem": 8}}},
    "a validation that is a list": {"validate": []},
}


@pytest.mark.parametrize("files", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_run_folder_is_one_line_and_leaves_the_old_page(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = make(tmp_path / "run", **files)
    (folder / "report.html").write_text("older")
    with pytest.raises(PlanError, match="expected") as caught:
        write_report(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "report.html").read_text() == "older"


FIGURE = st.one_of(st.none(), st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False))
KEYS = ("accuracy", "macs", "size_mb", "latency_ms_predicted", "latency_ms_measured", "energy")
FIGURES = st.fixed_dictionaries(dict.fromkeys(KEYS, FIGURE))
NOTHING: dict[str, Any] = dict.fromkeys(KEYS)
BUDGET = st.fixed_dictionaries({
    "cost": st.sampled_from(("macs", "latency_ms", "else")), "asked": st.floats(-1e300, 1e300), "predicted": FIGURE,
    "measured": FIGURE, "met": st.sampled_from((None, True, False)),
})  # fmt: skip


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stages=st.lists(FIGURES, min_size=1, max_size=4), budgets=st.lists(BUDGET, max_size=3),
       path=st.lists(st.tuples(st.floats(0, 1e30), st.floats(-1e30, 1e30)), max_size=4),
       scores=st.lists(st.floats(-1e30, 1e30), min_size=8, max_size=8), di=st.floats(-5, 5))  # fmt: skip
@example(stages=[dict.fromkeys(KEYS, 0.0), dict.fromkeys(KEYS, 1.7e308)], budgets=[], path=[], scores=[0.0] * 8, di=0.0)
@example(stages=[NOTHING | {"latency_ms_measured": 0}, NOTHING | {"latency_ms_measured": 1}, NOTHING | {"accuracy": 0},
                 NOTHING | {"accuracy": 0, "latency_ms_measured": -1e308}],
         budgets=[], path=[], scores=[0.0] * 8, di=0.0)  # fmt: skip
@example(stages=[NOTHING | {"macs": 3.6e-295}], budgets=[{"cost": "macs", "asked": 9.7e10, "predicted": None,
         "measured": None, "met": None}], path=[(0.0, 0.0)] * 2, scores=[0.0] * 8, di=0.0)  # fmt: skip
@example(stages=[NOTHING | {"macs": 1e-300}], budgets=[], path=[(0.0, 1.0), (1.0, 1e20)], scores=[0.0] * 8, di=0.0)
def test_any_finite_figures_make_a_page(
    tmp_path: Path, stages: list[dict[str, Any]], budgets: list[dict[str, Any]], path: list[tuple[float, float]],
    scores: list[float], di: float,
) -> None:  # fmt: skip
    points = tuple(PathPoint(loss, {"macs": cost}) for loss, cost in path)
    drawn = PruningPlan({"a": (0, 5)}, {"a": 8}, {"macs": PlannedCost(stages[0]["macs"] or 1.0, 1.0)}, path=points)
    figures_ = dict(zip(("base", "pruned", "recovered", "quantized"), stages, strict=False))
    folder = make(tmp_path / "run", plan=drawn.to_json(), scores={"di": {"a": di}, "scores": {"a": scores}},
                  metrics=figures_ | {"budgets": budgets, "seconds": {"score": abs(di)}})  # fmt: skip
    page_of(folder)
    for file in figures(folder, tmp_path / "pictures"):
        attributes = [
            text for e in ElementTree.parse(file).iter() for name, text in e.attrib.items() if name != "aria-label"
        ]
        assert not [text for text in attributes if "nan" in text or "inf" in text]


@pytest.mark.parametrize("prepare", [lambda p: None, lambda p: p.write_text("a file"), lambda p: p.mkdir()])
def test_what_is_no_run_folder_is_said_in_one_line(tmp_path: Path, prepare: Callable[[Path], Any]) -> None:
    prepare(tmp_path / "run")
    with pytest.raises(PlanError, match="run folder"):
        write_report(tmp_path / "run")


def test_an_unwritable_place_is_said_in_one_line(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(PlanError, match="can be written"):
        figures(folder, tmp_path / "taken")


@pytest.mark.parametrize("broken", [3, [3], [{}], [{**steps()[0], "accuracy_cut": "high"}],
                                    [{**steps()[0], "costs": {"macs": 3}}]], ids=str)  # fmt: skip
def test_broken_steps_are_one_line(tmp_path: Path, broken: Any) -> None:
    with pytest.raises(PlanError, match="whole figures"):
        read_run(make(tmp_path / "run", metrics={**metrics(), "steps": broken}))
