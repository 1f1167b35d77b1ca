"""What the report draws: bars, curves and bits as they are, whole SVG files, and nothing that is not so."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from report_pages import SVG, make, page_of
from report_pages import plan as handmade_plan

from diplugin.plan import PathPoint, PlannedCost, PruningPlan
from diplugin.report import figures, read_run
from diplugin.report.curves import calibration, journey, search_path, validation
from diplugin.report.rows import bit_map, channel_scores, kept_score, structure


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


def rightmost(text: ElementTree.Element) -> float:
    """Where a text that starts at its x ends in a wide font, at 0.62 of its 11 px a character."""
    return float(text.get("x", 0)) + 6.8 * len(text.text or "")


def test_words_over_the_path_of_a_search_under_all_four_budgets_do_not_meet(tmp_path: Path) -> None:
    costs = {name: PlannedCost(4, 2) for name in ("macs", "params", "memory_mb", "latency_ms")}
    path = tuple(PathPoint(loss, dict.fromkeys(costs, cost)) for loss, cost in ((0, 4), (0.1, 2)))
    asked = [{"cost": name, "asked": 2, "predicted": 2, "measured": None, "met": True} for name in costs]
    figures_ = {"base": {"accuracy": 0.5}, "pruned": {"accuracy": 0.5}, "budgets": asked}
    plan = PruningPlan({"a": (0,)}, {"a": 2}, costs, path=path)
    drawing = search_path(read_run(make(tmp_path / "run", plan=plan.to_json(), metrics=figures_)))
    assert drawing is not None
    over = [t for t in ElementTree.fromstring(drawing.inline()).iter(f"{SVG}text") if float(t.get("y", 0)) < 50]
    assert {"MACs", "Parameters", "Peak activation memory", "Latency", "budget"} < {t.text for t in over}
    assert all(t.get("text-anchor") == "start" and rightmost(t) <= drawing.width for t in over)
    for line in {t.get("y") for t in over}:
        here = sorted((t for t in over if t.get("y") == line), key=lambda t: float(t.get("x", 0)))
        assert all(rightmost(a) <= float(b.get("x", 0)) for a, b in pairwise(here))


def test_the_page_says_how_a_plan_was_found_that_no_greedy_steps_led_to(tmp_path: Path) -> None:
    steps = "Every step removes the channels"
    assert steps in page_of(make(tmp_path / "greedy")).text
    exact = replace(handmade_plan(), found_by="exact search: <proven>")
    text = page_of(make(tmp_path / "exact", plan=exact.to_json())).text
    assert steps not in text and "How it was found: exact search: <proven>." in text


def test_scores_of_another_network_are_not_drawn_as_this_ones(tmp_path: Path) -> None:
    other = {"di": {"stem": 0.4}, "scores": {"stem": [1.0] * 5}}
    run = read_run(make(tmp_path / "run", scores=other))
    assert channel_scores(run) is None and kept_score(run, "stem") is None
    page_of(tmp_path / "run")


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
