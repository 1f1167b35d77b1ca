"""The report of run folders made by hand: whole, partial, hostile and broken ones."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from diplugin.errors import PlanError
from diplugin.plan import PathPoint, PlannedCost, PruningPlan
from diplugin.report import figures, read_run, write_report
from diplugin.report.curves import calibration, journey, search_path, validation
from diplugin.report.page import latency_pill
from diplugin.report.rows import bit_map, channel_scores, kept_score, structure

SVG = "{http://www.w3.org/2000/svg}"


def plan() -> PruningPlan:
    path = tuple(PathPoint(loss, {"macs": macs, "latency_ms": ms}) for loss, macs, ms in
                 [(0.0, 1000.0, 2.0), (0.01, 800.0, 1.7), (0.05, 500.0, 1.2)])  # fmt: skip
    return PruningPlan(
        kept={"stem": tuple(range(6)), "body.conv1": (0, 3)},
        channels={"stem": 8, "body.conv1": 16},
        costs={"macs": PlannedCost(1000.0, 500.0), "latency_ms": PlannedCost(2.0, 1.2)},
        path=path,
    )


def metrics() -> dict[str, Any]:
    return {
        "base": {"accuracy": 0.9512, "macs": 1000, "params": 4000, "size_mb": 0.016, "latency_ms_predicted": 2.0,
                 "latency_ms_measured": 1.9},
        "pruned": {"accuracy": 0.62, "macs": 500, "params": 1500, "size_mb": None, "latency_ms_predicted": 1.2,
                   "latency_ms_measured": None},
        "recovered": {"accuracy": 0.9437, "macs": 500, "params": 1500, "size_mb": 0.006, "latency_ms_predicted": 1.2,
                      "latency_ms_measured": 1.25, "onnx_max_abs_difference": 2e-6},
        "budgets": [
            {"cost": "macs", "asked": 500.0, "predicted": 500.0, "measured": 500.0, "met": True},
            {"cost": "latency_ms", "asked": 1.22, "predicted": 1.2, "measured": 1.25, "met": False},
        ],
        "seconds": {"score": 1.5, "recover": 75.0},
        "data": {"chose": "900 training images", "judged": "holdout of 100 images"},
        "versions": {"torch": "2.13.0"},
        "seed": 7,
        "latency_table": {
            "name": "bench", "device": "a quiet machine", "setting": "onnxruntime", "origin": "measured",
            "emulated": False, "calibration": {"nets": 12, "mape": 0.021, "worst": 0.06, "rho": 0.99, "scale": 1.01,
                                               "offset_ms": 0.01},
            "nets": [{"predicted_ms": 1.0, "measured_ms": 1.02}, {"predicted_ms": 1.6, "measured_ms": 1.58}],
        },
    }  # fmt: skip


def scores() -> dict[str, Any]:
    return {
        "di": {"stem": 0.4, "body.conv1": 0.75}, "rho": 10.0, "images": 2000,
        "scores": {"stem": [0.01 * (i + 1) for i in range(8)], "body.conv1": [0.3, *[0.001] * 2, 0.2, *[0.0] * 12]},
        "left_alone": {"head": "its channels are an output of the model", "odd": "shares channels of stem"},
    }  # fmt: skip


def make(folder: Path, **files: Any) -> Path:
    """A run folder; a file given as None is left out, one given as text is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {
        "config": {"model": "TinyNet", "budgets": ["macs <= 0.5"], "limits": {"floor": 0.1}},
        "plan": plan().to_json(), "metrics": metrics(), "scores": scores(), **files,
    }  # fmt: skip
    for name, content in contents.items():
        if content is not None:
            (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close in order."""

    VOID = frozenset({"meta", "rect", "line", "path", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_is_one_file_that_fetches_and_runs_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    page = page_of(folder)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "a", "form"})
    attributes = [(name, text or "") for _, attrs in page.tags for name, text in attrs.items()]
    assert not [n for n, _ in attributes if n.startswith("on") or n in ("src", "href")]
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in source and "url(" not in source and "@import" not in source
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "metrics.json", "plan.json", "report.html", "scores.json"]  # fmt: skip


def test_figures_stand_before_and_after_with_prediction_beside_measurement(tmp_path: Path) -> None:
    text = page_of(make(tmp_path / "run")).text
    assert "TinyNet" in text
    assert "keeps 50 % of the multiply-accumulates, 38 % of the parameters and 66 % of the measured latency" in text
    assert "from 95.12 % to 94.37 % (−0.75 points)" in text
    assert "Accuracy 95.12 % 62.00 % 94.37 % −0.75 points" in text
    assert "File size 0.0160 MB – 0.0060 MB −62.5 %" in text
    # 2.0 / 1.9 and 1.2 / 1.25
    assert "Unpruned 2.00 ms 1.90 ms +5.3 %" in text and "Recovered 1.20 ms 1.25 ms −4.0 %" in text
    assert "MACs 500 500 500 ±0 % 100.0 % met" in text
    assert "Latency 1.22 ms 1.20 ms 1.25 ms −4.0 % 102.5 % missed" in text
    assert "76.5 s in all" in text
    assert "holdout of 100 images" in text and "Seed 7" in text and "2.13.0" in text
    assert "odd shares channels of stem" in text and "an output of the model" not in text
    assert "calibrated Held-out error 2.1 % (worst 6.0 %, 12 networks)" in text
    assert "scikit-learn" not in text


def test_bars_are_as_long_as_channels_are_many(tmp_path: Path) -> None:
    drawing = structure(read_run(make(tmp_path / "run")))
    assert drawing is not None
    bars = [
        (float(r.get("width", 0)), r.get("class")) for r in ElementTree.fromstring(drawing.inline()).iter(f"{SVG}rect")
    ]
    assert [kind for _, kind in bars] == ["fill-track", "fill-kept"] * 2
    widths = [width for width, _ in bars]
    per_channel = widths[2] / 16
    assert widths == pytest.approx([8 * per_channel, 6 * per_channel, 16 * per_channel, 2 * per_channel], abs=0.02)
    assert "6 / 8" in drawing.inline() and "2 / 16" in drawing.inline()


def test_share_of_score_kept_is_of_the_kept_channels(tmp_path: Path) -> None:
    run = read_run(make(tmp_path / "run"))
    assert kept_score(run, "stem") == pytest.approx(21 / 36)
    assert kept_score(run, "body.conv1") == pytest.approx(0.5 / 0.502)


def test_every_picture_is_a_whole_svg_file_of_its_own(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    paths = figures(folder, tmp_path / "out" / "pictures")
    assert {p.stem for p in paths} == {
        "summary", "structure", "channel_scores", "search_path", "stage_seconds", "calibration", "journey"}  # fmt: skip
    for path in paths:
        root = ElementTree.parse(path).getroot()
        assert root.tag == f"{SVG}svg" and root.get("aria-label")
        assert "prefers-color-scheme: dark" in path.read_text() and "http" not in path.read_text().replace(
            SVG[1:-1], ""
        )


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


def test_a_run_with_the_least_of_figures_still_has_a_page(tmp_path: Path) -> None:
    bare = {"base": {"accuracy": None, "macs": 10, "latency_ms_measured": None}, "pruned": {"macs": 5}}
    folder = make(tmp_path / "run", metrics=bare, scores=None, config={},
                  plan=PruningPlan({"a": (0,)}, {"a": 1}).to_json())  # fmt: skip
    page = page_of(folder)
    assert "keeps 50 % of the multiply-accumulates." in page.text and "Accuracy – – –" in page.text
    for missing in ("Budgets", "Latency, measured", "The path of the search", "Every channel", "Time"):
        assert missing not in page.text
    assert [p.stem for p in figures(folder, tmp_path / "out")] == ["summary", "structure"]


def test_a_network_without_groups_and_figures_without_extent_are_drawn(tmp_path: Path) -> None:
    flat = PruningPlan({"a": (0,)}, {"a": 2}, {"macs": PlannedCost(4, 4)},
                       path=(PathPoint(0, {"macs": 4}), PathPoint(0, {"macs": 4})))  # fmt: skip
    same = {"base": {"accuracy": 0.5, "macs": 4}, "pruned": {"accuracy": 0.5, "macs": 4}, "seconds": {"score": 0.0}}
    run = read_run(make(tmp_path / "flat", plan=flat.to_json(), metrics=same,
                        scores={"di": {"a": 0.0}, "scores": {"a": [0.0, 0.0]}}))  # fmt: skip
    assert structure(run) and search_path(run) and journey(run)
    assert channel_scores(run) is None and calibration(run) is None
    page_of(tmp_path / "flat")
    page_of(make(tmp_path / "none", plan=PruningPlan({}, {}).to_json()))
    one = {"di": {"a": 0.5}, "scores": {"a": [0.2, 0.2]}}
    assert channel_scores(read_run(make(tmp_path / "one", plan=flat.to_json(), scores=one)))


def test_scores_of_another_network_are_not_drawn_as_this_ones(tmp_path: Path) -> None:
    other = {"di": {"stem": 0.4}, "scores": {"stem": [1.0] * 5}}
    run = read_run(make(tmp_path / "run", scores=other))
    assert channel_scores(run) is None and kept_score(run, "stem") is None
    page_of(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "label"),
    [({}, "calibrated"), ({"calibration": None}, "uncalibrated"), ({"origin": "estimated"}, "estimated"),
     ({"origin": "estimated", "emulated": True}, "emulated")],
)  # fmt: skip
def test_a_table_is_labelled_by_how_far_it_can_be_trusted(tmp_path: Path, changes: dict[str, Any], label: str) -> None:
    figures_ = metrics()
    figures_["latency_table"] |= changes
    pill = latency_pill(read_run(make(tmp_path / "run", metrics=figures_)))
    assert pill is not None and pill.text == label and (pill.tone == "good") == (label == "calibrated")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_times_in_8_bits_are_said_to_be_so(tmp_path: Path, dtype: str) -> None:
    figures_ = metrics()
    figures_["latency_table"] |= {"dtype": dtype}
    assert ("networks in 8 bits" in page_of(make(tmp_path / "run", metrics=figures_)).text) == (dtype == "int8")


def test_the_cross_check_with_scikit_learn_is_shown_layer_by_layer(tmp_path: Path) -> None:
    found = [("DI", 8, 0.9), ("DI", 2, 0.7), ("L1", 2, 0.5), ("L1", 8, 0.9), ("unheard of", 1, 1), ("random", 4, 0.5)]
    rows = [{"criterion": criterion, "kept": kept, "accuracy": rate} for criterion, kept, rate in found]
    layers = [
        {"layer": "stem", "worst_difference": 3e-15, "non_decreasing": True, "accuracies": rows},
        {"layer": "body", "worst_difference": None, "non_decreasing": False, "accuracies": [3]},
        "odd",
    ]
    folder = make(tmp_path / "run", validate={"layers": layers})
    text = page_of(folder).text
    assert "stem 3e-15 yes" in text and "body – no" in text
    drawing = validation(read_run(folder))
    assert drawing is not None
    curves = list(ElementTree.fromstring(drawing.inline()).iter(f"{SVG}path"))
    assert [p.get("class") for p in curves] == ["stroke-third", "stroke-kept"]
    # 0.7 at 2 channels is drawn lower and further left than 0.9 at 8.
    first, last = (list(map(float, step.split())) for step in curves[1].get("d", "")[1:].split(" L"))
    assert first[0] < last[0] and first[1] > last[1]


def test_a_quantized_network_does_not_borrow_the_float_ones_latency(tmp_path: Path) -> None:
    quantized = metrics()
    quantized["quantized"] = {
        "accuracy": 0.93, "macs": 500, "params": 1500, "size_mb": 0.002, "latency_ms_predicted": None,
        "latency_ms_measured": None, "mean_bits": 4.25, "size_mb_predicted": 0.0021, "kept_float": {"head": "is odd"},
    }  # fmt: skip
    folder = make(tmp_path / "run", metrics=quantized)
    run, text = read_run(folder), page_of(folder).text
    assert run.last("latency_ms_measured") is None and run.last("latency_ms_measured", quantized=False) == 1.25
    assert "The quantized network keeps 50 % of the multiply-accumulates and 38 % of the parameters." in text
    assert "1.25 ms from 1.90 ms −34.2 %, measured before quantization" in text
    assert "Latency, measured 1.90 ms – 1.25 ms – –" in text
    assert "Bits per weight, mean – – – 4.25 bits" in text
    assert "File size, MB" in text  # the axis of accuracy against cost: the one cost that every stage has


def test_a_time_taken_on_a_device_is_not_compared_with_one_taken_here(tmp_path: Path) -> None:
    there = metrics() | {"measured_on": "pi@bench"}
    there["recovered"]["peak_memory_mb_measured"] = 61.5
    text = page_of(make(tmp_path / "run", metrics=there)).text
    assert "timed on pi@bench, after the run" in text and "1.90 ms" not in text
    assert "Latency, measured – – 1.25 ms –" in text and "60 % of the predicted latency" in text
    assert "Peak memory of the process – – 61.5 MB" in text
    assert "1.90 ms" in page_of(make(tmp_path / "run", metrics=metrics() | {"measured_on": "here"})).text


def test_the_bits_of_every_channel_are_drawn_in_order(tmp_path: Path) -> None:
    run = read_run(make(tmp_path / "run", bits={"version": 1, "bits": {"stem": [8, 8, 4, 0], "head": [2, 2]}}))
    drawing = bit_map(run)
    assert drawing is not None
    cells = [r for r in ElementTree.fromstring(drawing.inline()).iter(f"{SVG}rect") if len(r)]
    assert [c[0].text for c in cells] == ["stem: 8 bits", "stem: 4 bits", "stem: 0 bits", "head: 2 bits"]
    widths = [float(c.get("width", 0)) for c in cells]
    assert widths == pytest.approx([2 * widths[1], widths[1], widths[1], 2 * widths[1]], abs=0.02)
    shades = [float(c.get("fill-opacity", 1)) for c in cells]
    assert shades[0] > shades[1] > shades[3] and cells[2].get("class") == "fill-track"
    assert "5.00" in drawing.inline() and "2.00" in drawing.inline()


def test_an_accuracy_that_stays_is_said_to_stay(tmp_path: Path) -> None:
    same = metrics()
    same["recovered"]["accuracy"] = same["base"]["accuracy"] + 1e-6
    assert "Accuracy stayed at 95.12 %." in page_of(make(tmp_path / "run", metrics=same)).text


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


def steps() -> list[dict[str, Any]]:
    return [
        {"step": 1, "costs": {"macs": {"base": 1000.0, "predicted": 700.0}}, "repair": "reconstruction",
         "accuracy_cut": 0.91, "accuracy_taught": 0.935},
        {"step": 2, "costs": {"macs": {"base": 1000.0, "predicted": 500.0}}, "repair": "<b>odd</b>",
         "accuracy_cut": 0.88, "accuracy_taught": None},
    ]  # fmt: skip


def test_steps_are_told_where_there_were_any(tmp_path: Path) -> None:
    assert "Step by step" not in page_of(make(tmp_path / "one")).text
    text = page_of(make(tmp_path / "two", metrics={**metrics(), "steps": steps()})).text
    assert "1 70.0 % reconstruction 91.00 % 93.50 %" in text
    assert "2 50.0 % <b>odd</b> 88.00 % –" in text


@pytest.mark.parametrize("broken", [3, [3], [{}], [{**steps()[0], "accuracy_cut": "high"}],
                                    [{**steps()[0], "costs": {"macs": 3}}]], ids=str)  # fmt: skip
def test_broken_steps_are_one_line(tmp_path: Path, broken: Any) -> None:
    with pytest.raises(PlanError, match="whole figures"):
        read_run(make(tmp_path / "run", metrics={**metrics(), "steps": broken}))
