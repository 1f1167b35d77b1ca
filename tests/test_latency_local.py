"""Profiling this machine, end to end, small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from diplugin.costs.latency import LatencyCost
from diplugin.errors import TableError
from diplugin.latency import OnnxTiming, Protocol, profile_here
from diplugin.latency.local import is_this_machine
from diplugin.latency.noted import note_measurement
from diplugin.network import trace_network
from diplugin.tables import Calibration, LatencyTable

QUICK = Protocol(rounds=3, runs=3, min_runs=1, round_ms=0.5, warmup_ms=0.0, patience=1, gap_ms=0.0, pause_s=0.0)
INPUTS = (torch.zeros(1, 3, 8, 8),)


def net() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()


def test_a_profile_of_this_machine_predicts_and_loads_again(tmp_path: Path) -> None:
    model = net()
    seen: list[tuple[int, int]] = []
    table = profile_here(
        model,
        INPUTS,
        name="here",
        budget_s=5,
        protocol=QUICK,
        nets=10,
        out=tmp_path / "t.json",
        journal=tmp_path / "j.jsonl",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert LatencyTable.load(tmp_path / "t.json").by_key.keys() == table.by_key.keys()
    assert is_this_machine(table) and len(table.nets) == 11 and not table.emulated
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1]
    table = replace(table, calibration=Calibration(1.5, 0.1, 11, 0.0, 0.0, 1.0))  # nets this small need not fit a line
    cost = LatencyCost(trace_network(model, INPUTS), table)
    assert cost.base == pytest.approx(1.5 * table.nets[0].sum_ms + 0.1)


def test_a_journal_of_other_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("not a journal\n")
    with pytest.raises(TableError, match="damaged"):
        profile_here(net(), INPUTS, budget_s=1, protocol=QUICK, nets=1, journal=tmp_path / "j")


def test_a_measurement_is_noted_beside_the_prediction(tmp_path: Path) -> None:
    import json

    metrics = {
        "base": {},
        "pruned": {"latency_ms_predicted": 2.0},
        "recovered": {"latency_ms_predicted": 2.0},
        "budgets": [
            {"cost": "latency_ms", "asked": 2.5, "met": None, "measured": None, "predicted": 2.0},
            {"cost": "macs", "asked": 1.0, "met": True, "measured": 1.0, "predicted": 1.0},
        ],
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    note_measurement(tmp_path, OnnxTiming(2.6, 2.6, 2.7, 0.01, 80.0), "pi@desk")
    noted = json.loads((tmp_path / "metrics.json").read_text())
    assert noted["recovered"]["latency_ms_measured"] == 2.6 and noted["recovered"]["peak_memory_mb_measured"] == 80.0
    assert noted["budgets"][0]["measured"] == 2.6 and noted["budgets"][0]["met"] is False
    assert noted["budgets"][1] == metrics["budgets"][1] and noted["measured_on"] == "pi@desk"
