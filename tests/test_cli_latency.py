"""profile, tables and measure: arguments reach the library, answers reach the user, and mistakes are one line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from diplugin.cli import measure, profile, tables
from diplugin.errors import DipluginError
from diplugin.latency import local, onnx_timing, plan
from diplugin.latency.plan import Protocol

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


def test_measure_times_an_onnx_file(net: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from diplugin.latency.graphs import export_bytes

    Path("net.onnx").write_bytes(export_bytes(torch.nn.Conv2d(1, 8, 3), (torch.zeros(1, 1, 8, 8),), ["x"]))
    assert cli("measure", "net.onnx") == 0
    said = capsys.readouterr().out
    assert " ms (here" in said and "peak memory" in said
    with pytest.raises(DipluginError, match=r"none\.onnx"):
        cli("measure", "none.onnx")


def test_list_names_the_shipped_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from diplugin.table_format import shipped_tables

    assert cli("tables", "list") == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == list(shipped_tables())
