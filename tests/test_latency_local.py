"""Profiling this machine, end to end, small."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tables import table
from torch import nn

from diplugin.costs.latency import LatencyCost
from diplugin.errors import TableError
from diplugin.latency import OnnxTiming, Protocol, device, finish, load_bundle, local, profile_here, runtime_setting
from diplugin.latency.local import Subject, fitting_plan, is_this_machine
from diplugin.latency.noted import note_measurement
from diplugin.network import trace_network
from diplugin.tables import Alignment, Calibration, LatencyTable

QUICK = Protocol(rounds=3, runs=3, min_runs=1, round_ms=0.5, warmup_ms=0.0, patience=1, gap_ms=0.0, pause_s=0.0)
INPUTS = (torch.zeros(1, 3, 8, 8),)


def net() -> nn.Sequential:
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


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"threads": 2}, True),
        ({"provider": "CUDAExecutionProvider"}, False),
        ({"graph_optimization": "basic"}, False),
        ({"runtime": "torch"}, False),
        ({"version": "0.1"}, False),
    ],
)
def test_a_table_is_this_machines_only_where_files_are_timed_as_it_was(changes: dict[str, Any], expected: bool) -> None:
    """A GPU's table of this machine says nothing of what its processor takes."""
    setting = replace(runtime_setting(), **changes)
    assert is_this_machine(table(8, device=device.device_model(), setting=setting)) is expected
    assert not is_this_machine(table(8, device="Raspberry Pi 5", setting=setting))


def test_a_journal_of_other_work_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("not a journal\n")
    with pytest.raises(TableError, match="damaged"):
        profile_here(net(), INPUTS, budget_s=1, protocol=QUICK, nets=1, journal=tmp_path / "j")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of the net, whole, beside its bundle."""
    journal = tmp_path_factory.mktemp("kept") / "j.jsonl"
    profile_here(net(), INPUTS, budget_s=1, protocol=QUICK, nets=1, journal=journal)
    return journal


@pytest.mark.parametrize(
    ("channels", "side", "changes"),
    [(12, 8, {}), (16, 10, {}), (16, 8, {"threads": 2}), (16, 8, {"dtype": "int8"})],
    ids=["other network", "other size", "other threads", "other number type"],
)
def test_a_journal_of_another_network_or_setting_is_not_gone_on_with(
    channels: int, side: int, changes: dict[str, Any], kept: Path
) -> None:
    """Its table would be one of the old network under the new one's name."""
    model, before = net(), kept.read_bytes()
    model[0], model[2] = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 16, 3, padding=1)
    with pytest.raises(TableError, match="other work"):
        profile_here(model, (torch.zeros(1, 3, side, side),), budget_s=1, nets=1, journal=kept, **changes)
    assert kept.read_bytes() == before


def test_a_kept_journal_gives_its_table_again_under_the_name_that_is_asked_for(kept: Path) -> None:
    before = kept.read_bytes()
    table = profile_here(net(), INPUTS, name="again", budget_s=1, nets=1, journal=kept)
    assert table.name == "again" and kept.read_bytes() == before
    assert table.by_key == finish(load_bundle(kept.with_suffix(".pyz")).plan, kept).by_key


def test_a_table_that_finds_no_place_is_told_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "probe", lambda _: pytest.fail("timed"))
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "table.json"):
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            profile_here(net(), INPUTS, out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("points", [2, 5, 16])
def test_as_many_widths_as_asked_for_where_there_is_time(points: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1))
    subject = Subject(model, INPUTS, trace_network(model, INPUTS), runtime_setting())
    plan = fitting_plan(subject, Alignment(1, 1), 0.0, name="p", budget_s=1e9, points=points, nets=1, seed=0,
                        protocol=QUICK)  # fmt: skip
    assert all(points - 1 <= len(widths) <= points + 1 for widths in plan.grid.values())


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
