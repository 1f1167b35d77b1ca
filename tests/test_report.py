"""What the page says of run folders made by hand, whole and partial ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_pages import make, metrics, page_of, steps

from diplugin.plan import PruningPlan
from diplugin.report import figures, read_run
from diplugin.report.page import latency_pill


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


def test_a_run_with_the_least_of_figures_still_has_a_page(tmp_path: Path) -> None:
    bare = {"base": {"accuracy": None, "macs": 10, "latency_ms_measured": None}, "pruned": {"macs": 5}}
    folder = make(tmp_path / "run", metrics=bare, scores=None, config={},
                  plan=PruningPlan({"a": (0,)}, {"a": 1}).to_json())  # fmt: skip
    page = page_of(folder)
    assert "keeps 50 % of the multiply-accumulates." in page.text and "Accuracy – – –" in page.text
    for missing in ("Budgets", "Latency, measured", "The path of the search", "Every channel", "Time"):
        assert missing not in page.text
    assert [p.stem for p in figures(folder, tmp_path / "out")] == ["summary", "structure"]


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


def test_an_accuracy_that_stays_is_said_to_stay(tmp_path: Path) -> None:
    same = metrics()
    same["recovered"]["accuracy"] = same["base"]["accuracy"] + 1e-6
    assert "Accuracy stayed at 95.12 %." in page_of(make(tmp_path / "run", metrics=same)).text


def test_steps_are_told_where_there_were_any(tmp_path: Path) -> None:
    assert "Step by step" not in page_of(make(tmp_path / "one")).text
    text = page_of(make(tmp_path / "two", metrics={**metrics(), "steps": steps()})).text
    assert "1 70.0 % reconstruction 91.00 % 93.50 %" in text
    assert "2 50.0 % <b>odd</b> 88.00 % –" in text
