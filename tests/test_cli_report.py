"""`diplugin report` and `diplugin export` on run folders, as arguments."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diplugin.cli import export as export_command
from diplugin.cli import report as report_command
from diplugin.errors import PlanError, UserError
from diplugin.network import trace_network
from diplugin.onnx_inference import run_onnx
from diplugin.plan import PruningPlan
from diplugin.surgery import apply_plan, save_pruned

MODULE = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
"""


def call(command: object, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())  # type: ignore[attr-defined]
    args = parser.parse_args(arguments)
    return args.run(args)


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, nn.Module]:
    """A run folder with a pruned network, and that network."""
    (tmp_path / "small_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from importlib import import_module

    model = import_module("small_models").small().eval()
    inputs = trace_network(model, (torch.randn(1, 3, 6, 6),)).inputs
    plan = PruningPlan({"0": (0, 2, 3, 7)}, {"0": 8}, inputs=inputs)
    pruned = apply_plan(model, plan)
    folder = tmp_path / "run"
    save_pruned(pruned, plan, folder)
    (folder / "config.json").write_text(json.dumps({"source": "small_models:small"}))
    (folder / "metrics.json").write_text(json.dumps({"base": {"accuracy": 0.5}, "pruned": {"accuracy": 0.4}}))
    return folder, pruned.eval()


def test_report_writes_the_page_and_the_pictures(
    run_folder: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run_folder
    assert call(report_command, "report", str(folder), "--figures", str(tmp_path / "pictures")) == 0
    pictures = [tmp_path / "pictures" / f"{name}.svg" for name in ("summary", "structure")]
    assert capsys.readouterr().out.splitlines() == [str(folder / "report.html"), *map(str, pictures)]
    assert all(path.is_file() for path in pictures)


def test_report_of_a_killed_run_is_the_users_error(run_folder: tuple[Path, nn.Module]) -> None:
    folder, _ = run_folder
    (folder / "metrics.json").unlink()
    with pytest.raises(PlanError, match=r"lacks metrics\.json; finish it with --resume") as caught:
        call(report_command, "report", str(folder))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("named", [True, False])
def test_export_rebuilds_the_pruned_network(
    run_folder: tuple[Path, nn.Module], tmp_path: Path, capsys: pytest.CaptureFixture[str], named: bool
) -> None:
    folder, pruned = run_folder
    target = tmp_path / "again.onnx"
    source = ["--model", "small_models:small"] if named else []
    if named:
        (folder / "config.json").write_text("{}")
    assert call(export_command, "export", str(folder), "--out", str(target), *source) == 0
    assert str(target) in capsys.readouterr().out
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx(target, [x])[0], pruned(x).numpy(), rtol=1e-4, atol=1e-5)


def test_export_asks_for_the_model_where_the_run_does_not_say(
    run_folder: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    folder, _ = run_folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="expected --model"):
        call(export_command, "export", str(folder), "--out", str(tmp_path / "x.onnx"))
    with pytest.raises(PlanError, match=r"config\.json"):
        call(export_command, "export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.onnx"))
    assert not (tmp_path / "x.onnx").exists()
