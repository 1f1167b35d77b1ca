"""Run folders made by hand, and the page that the report writes of one, read by its tags and words."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from diplugin.plan import PathPoint, PlannedCost, PruningPlan
from diplugin.report import write_report

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


def steps() -> list[dict[str, Any]]:
    return [
        {"step": 1, "costs": {"macs": {"base": 1000.0, "predicted": 700.0}}, "repair": "reconstruction",
         "accuracy_cut": 0.91, "accuracy_taught": 0.935},
        {"step": 2, "costs": {"macs": {"base": 1000.0, "predicted": 500.0}}, "repair": "<b>odd</b>",
         "accuracy_cut": 0.88, "accuracy_taught": None},
    ]  # fmt: skip
