"""profile, tables and measure: arguments reach the library, answers reach the user, and mistakes are one line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from diplugin.cli import measure, profile, tables
from diplugin.errors import DipluginError, PlanError, TableError
from diplugin.latency import device, local, onnx_timing, plan
from diplugin.latency.noted import note_measurement
from diplugin.latency.plan import Protocol
from diplugin.plan import PruningPlan

QUICK = Protocol(rounds=2, runs=2, min_runs=1, round_ms=0.2, warmup_ms=0.0, patience=1, gap_ms=0.0, pause_s=0.0)
NET = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, 4))
"""


def cli(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    for family in (profile, tables, measure):
        family.add_parser(subparsers)
    args = parser.parse_args([str(word) for word in words])
    return args.run(args)


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    (tmp_path / "latency_cli_net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("latency_cli_net", None)
    for module in (plan, local):
        monkeypatch.setattr(module, "THOROUGH", QUICK)
        monkeypatch.setattr(module, "QUICK", QUICK)
    monkeypatch.setattr(onnx_timing, "WHOLE_NET", QUICK)
    return ("latency_cli_net:tiny", "--example-shape", "1,1,8,8")


def test_plan_run_finish_show_check_plot_and_diff(net: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("profile", "plan", *net, "--step", "4", "--nets", "2", "--net-ms", "0.1", "--out", "b.pyz") == 0
    assert "operators" in capsys.readouterr().out
    assert cli("profile", "run", "b.pyz", "--quiet") == 0
    assert cli("profile", "finish", "b.pyz", "b.jsonl", "--device", "bench", "--out", "t.json") == 0
    assert "bench" in capsys.readouterr().out
    assert cli("tables", "show", "t.json") == 0
    shown = capsys.readouterr().out
    assert "uncalibrated" in shown and "conv+relu" in shown
    assert cli("tables", "plot", "t.json", "--of", "conv+relu", "--out", "t.png") == 0
    assert Path("t.png").stat().st_size > 1000
    capsys.readouterr()
    assert cli("tables", "diff", "t.json", "t.json") == 0
    assert "copy" in capsys.readouterr().out
    with pytest.raises(DipluginError, match="another") as error:
        cli("tables", "check", "t.json", "--device", "another")
    assert error.value.exit_code == 2


@pytest.mark.parametrize("name", ["n" * 500, "two\nlines"])
@pytest.mark.parametrize("words", [("plan", "--out", "b.pyz"), ("here", "--out", "t.json")])
def test_a_name_that_no_table_can_have_is_refused_before_anything_is_timed(
    net: tuple[str, ...], words: tuple[str, ...], name: str
) -> None:
    with pytest.raises(TableError, match="expected a name") as error:
        cli("profile", words[0], *net, *words[1:], "--name", name)
    assert "\n" not in str(error.value) and list(Path().glob("*.pyz")) == list(Path().glob("*.json")) == []


def test_here_writes_a_table(net: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("profile", "here", *net, "--seconds", "1", "--nets", "1", "--out", "here.json") == 0
    assert json.loads(Path("here.json").read_text())["name"] == "here"
    assert "operators on" in capsys.readouterr().out


def test_estimate_prints_json_and_writes_a_table(net: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    words = ("tables", "estimate", "--device", "jetson-nano-cpu", "--model", *net)
    assert cli(*words, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"latency_ms", "low", "high"} and 0 < answer["low"] < answer["latency_ms"] < answer["high"]
    assert cli(*words, "--out", "nano.json") == 0
    assert json.loads(Path("nano.json").read_text())["origin"] == "estimated"
    with pytest.raises(DipluginError, match="abacus"):
        cli("tables", "estimate", "--device", "abacus", "--model", *net)


@pytest.mark.parametrize("points", ["0", "-3"])
def test_a_table_without_points_is_never_begun(net: tuple[str, ...], points: str) -> None:
    with pytest.raises(SystemExit):
        cli("tables", "estimate", "--device", "jetson-nano-cpu", "--model", *net, "--points", points)


def test_measure_times_an_onnx_file(net: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from diplugin.latency.graphs import export_bytes

    Path("net.onnx").write_bytes(export_bytes(torch.nn.Conv2d(1, 8, 3), (torch.zeros(1, 1, 8, 8),), ["x"]))
    assert cli("measure", "net.onnx") == 0
    said = capsys.readouterr().out
    assert " ms (here" in said and "peak memory" in said
    with pytest.raises(DipluginError, match=r"none\.onnx"):
        cli("measure", "none.onnx")


@pytest.mark.parametrize("unstable", [True, False])
def test_a_time_of_a_throttled_device_is_said_to_be_one(
    unstable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = onnx_timing.OnnxTiming(1.1, 1.1, 1.1, 0.0, 5.0, unstable)
    monkeypatch.setattr("diplugin.latency.remote.measure_there", lambda *_, **__: timing)
    assert cli("measure", tmp_path / "net.onnx", "--ssh", "pi@desk") == 0
    assert ("never came to rest" in capsys.readouterr().out) is unstable


def whole_run(folder: Path, **changes: Any) -> Path:
    """A run planned with a table of another device, on which its latency budget is missed by prediction."""
    budget = {"cost": "latency_ms", "asked": 12.0, "predicted": 13.5, "measured": None, "met": False}
    table = {"name": "pi", "device": "Raspberry Pi 5", "origin": "measured", "threads": 4, "profiled_on": "a Pi"}
    pruned = {"accuracy": 0.4, "latency_ms_predicted": 13.5}
    metrics = {"base": {"accuracy": 0.5}, "pruned": pruned, "budgets": [budget], "latency_table": table, **changes}
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "plan.json").write_text(PruningPlan({}, {}).to_json())
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Nothing is timed: everything takes 1.1 ms; threads and number type of every timing."""
    asked = list[tuple[int, str]]()

    def timed(_: Path, *, threads: int, dtype: str) -> onnx_timing.OnnxTiming:
        asked.append((threads, dtype))
        return onnx_timing.OnnxTiming(1.1, 1.1, 1.1, 0.0, 5.0)

    monkeypatch.setattr(onnx_timing, "measure_apart", timed)
    return asked


def test_a_time_taken_here_does_not_judge_another_devices_budget(
    tmp_path: Path, asked: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole_run(tmp_path / "run")
    before = json.loads((run / "metrics.json").read_text())["budgets"]
    assert cli("measure", run) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["budgets"] == before
    assert metrics["pruned"]["latency_ms_measured"] == 1.1 and metrics["measured_on"] == device.device_model()
    assert asked == [(4, "float32")], "as the table's entries were timed"
    assert "planned for Raspberry Pi 5" in capsys.readouterr().out


@pytest.mark.parametrize("known", ["device", "profiled_on"])
def test_a_time_taken_on_the_tables_device_judges(
    tmp_path: Path, asked: list[tuple[int, str]], capsys: pytest.CaptureFixture[str], known: str
) -> None:
    run = whole_run(tmp_path / "run", latency_table={"device": "desk", known: device.device_model()})
    assert cli("measure", run) == 0 and cli("measure", run, "--threads", "2") == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["budgets"][0]["measured"] == 1.1 and metrics["budgets"][0]["met"] is True
    assert asked == [(1, "float32"), (2, "float32")] and metrics["measured_on"] == "here"
    assert "planned for" not in capsys.readouterr().out


def test_a_run_planned_in_8_bits_is_timed_in_8_bits(
    tmp_path: Path, asked: list[tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    here = device.device_model()
    run = whole_run(tmp_path / "run", latency_table={"device": here, "profiled_on": here, "dtype": "int8"})
    assert cli("measure", run) == 0
    assert asked == [(1, "int8")] and "in 8 bits" in capsys.readouterr().out
    assert cli("measure", run / "model.onnx") == 0
    assert asked[1:] == [(1, "float32")] and "in 8 bits" not in capsys.readouterr().out, "a file alone is what it is"


@pytest.mark.parametrize(
    "changes",
    [{"pruned": [1]}, {"recovered": [1]}, {"pruned": None}, {"base": 3}, {"budgets": ["x"]}, {"seed": float("nan")},
     {"budgets": [{"cost": "latency_ms"}]}],
    ids=str,
)  # fmt: skip
def test_broken_metrics_are_refused_before_anything_is_timed(
    tmp_path: Path, asked: list[tuple[int, str]], changes: dict[str, Any]
) -> None:
    run = whole_run(tmp_path / "run", **changes)
    before = (run / "metrics.json").read_bytes()
    with pytest.raises(PlanError, match="expected"):
        cli("measure", run)
    if "base" not in changes:  # what the library needs of a run is less than a page
        with pytest.raises(PlanError, match="expected"):
            note_measurement(run, onnx_timing.OnnxTiming(1.1, 1.1, 1.1, 0.0, 5.0), "here")
    assert (run / "metrics.json").read_bytes() == before and asked == []


def test_list_names_the_shipped_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from diplugin.tables.file_format import shipped_tables

    assert cli("tables", "list") == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == list(shipped_tables())
