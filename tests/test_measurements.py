"""Verdicts on budgets, and figures that are counted on the network itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diplugin import latency
from diplugin.costs import Budget
from diplugin.features import forward_inputs, labels_of
from diplugin.groups import remove_channels
from diplugin.latency.device import device_model
from diplugin.measurements import Measure, finite, verdict, versions
from diplugin.network import trace_network
from diplugin.plan import PlannedCost, PruningPlan
from diplugin.tables import Entry, LatencyTable, OpKey

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def measure_of(inputs: tuple[Tensor, ...], folder: Path) -> Measure:
    """Judged on four images of the inputs' shape."""
    batches = [(torch.randn(4, *inputs[0].shape[1:]), torch.zeros(4, dtype=torch.long))]
    return Measure(batches, inputs, None, labels_of, forward_inputs, folder / "unpruned.onnx")


def plan_with(**costs: tuple[float, float]) -> PruningPlan:
    return PruningPlan({"a": (0,)}, {"a": 2}, {name: PlannedCost(*values) for name, values in costs.items()})


def test_a_budget_is_met_as_measured() -> None:
    plan = plan_with(latency_ms=(10.0, 4.9))
    budget, base = Budget("latency_ms", limit=5.0), {"latency_ms_measured": 10.0}
    assert verdict(budget, base, plan, {"latency_ms_measured": 4.8})["met"]
    assert not verdict(budget, base, plan, {"latency_ms_measured": 5.2})["met"]
    line = verdict(budget, base, plan, {"latency_ms_measured": None})
    assert line == {"cost": "latency_ms", "asked": 5.0, "predicted": 4.9, "measured": None, "met": True}


def test_a_fraction_of_latency_is_of_the_unpruned_networks_as_measured() -> None:
    plan, budget = plan_with(latency_ms=(10.0, 4.9)), Budget("latency_ms", fraction=0.5)
    for slow in (0.9, 1.2):  # a machine at another speed than when its table was made
        base = {"latency_ms_measured": 10.0 * slow}
        assert verdict(budget, base, plan, {})["asked"] == pytest.approx(5.0 * slow)
        assert verdict(budget, base, plan, {"latency_ms_measured": 4.9 * slow})["met"]
        assert not verdict(budget, base, plan, {"latency_ms_measured": 5.1 * slow})["met"]
    assert verdict(budget, {"latency_ms_measured": None}, plan, {})["asked"] == 5.0


@pytest.mark.usefixtures("brief_timing")
def test_both_networks_are_timed(tmp_path: Path, make_net: MakeNet) -> None:
    model, inputs = make_net("residual")
    measure = measure_of(inputs, tmp_path)
    figures = measure.base(model, [])
    assert figures["latency_ms_measured"] > 0
    remove_channels(model, inputs, {trace_network(model, inputs).prunable[0].name: [0, 1]})
    path = tmp_path / "model.onnx"
    assert measure.exported(model, path)["size_mb"] == pytest.approx(path.stat().st_size / 1e6)
    before, after = measure.timed(measure.unpruned, path)
    assert before is not None and after is not None and before > 0 < after
    assert path.stat().st_size < measure.unpruned.stat().st_size


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_networks_are_timed_in_the_form_that_the_table_speaks_of(
    dtype: str, tmp_path: Path, make_net: MakeNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def side_by_side(paths: Sequence[Path], *, threads: int, dtype: str) -> list[latency.OnnxTiming]:
        asked.append(dtype)
        return [latency.OnnxTiming(1.0, 1.0, 1.0, 0.0)] * len(paths)

    monkeypatch.setattr(latency, "measure_side_by_side", side_by_side)
    model, inputs = make_net("plain")
    entry = Entry(OpKey("linear", 6, 5, dtype=dtype), 1.0, 1.0, 1.0, 0.0)
    table = LatencyTable("here", device_model(), latency.runtime_setting(1), (entry,))
    measure = replace(measure_of(inputs, tmp_path), table=table)
    assert measure.local and measure.base(model, [])["latency_ms_measured"] == 1.0 and asked == [dtype]


def test_costs_are_counted_on_the_cut_network(tmp_path: Path, make_net: MakeNet) -> None:
    model, inputs = make_net("residual")
    group = trace_network(model, inputs).prunable[0]
    remove_channels(model, inputs, {group.name: [0, 1]})
    figures = measure_of(inputs, tmp_path).pruned(model, plan_with(macs=(1.0, 1.0)))
    assert figures["params"] == sum(p.numel() for p in model.parameters())
    assert 0 <= figures["accuracy"] <= 1 and figures["latency_ms_predicted"] is None


def test_json_gets_no_nan() -> None:
    assert finite({"a": [math.nan, 1.0], "b": (math.inf, "x")}) == {"a": [None, 1.0], "b": [None, "x"]}


@pytest.mark.parametrize("name", ["python", "torch", "machine"])
def test_versions_name_what_figures_depend_on(name: str) -> None:
    assert versions()[name]
