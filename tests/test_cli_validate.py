"""`diplugin validate` from arguments to tables and files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from small_net import own_module

from diplugin.cli import validate
from diplugin.errors import ModelError, UserError


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return own_module("my_validated_net", tmp_path, monkeypatch)


def arguments(model: str, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    validate.add_parser(parser.add_subparsers())
    return parser.parse_args(["validate", model, "digits", "--example-shape", "1,1,24,24", "--images", "300", *more])


def test_tables_and_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(model, "--json", str(tmp_path / "v.json"), "--plot", str(tmp_path / "v.svg"))
    assert args.run(args) == 0
    printed = capsys.readouterr().out
    assert "KernelRidge" in printed and "largest difference to scikit-learn" in printed
    assert "mean of 2 layers" in printed
    record = json.loads((tmp_path / "v.json").read_text())
    assert {layer["layer"] for layer in record["layers"]} == {"0", "2"}
    halves = [row["accuracy"] for layer in record["layers"] for row in layer["accuracies"]
              if row["criterion"] == "L1" and row["kept"] == {"0": 3, "2": 4}[layer["layer"]]]  # fmt: skip
    assert record["means"]["kept"][2] == 0.5
    assert record["means"]["accuracies"]["L1"][2] == pytest.approx(sum(halves) / 2)
    assert all(layer["worst_difference"] < 1e-6 and layer["non_decreasing"] for layer in record["layers"])
    assert "<svg" in (tmp_path / "v.svg").read_text(encoding="utf-8")


def test_one_layer_and_unusable_arguments(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(model, "--layer", "2")
    assert args.run(args) == 0
    assert "0: LDA" not in capsys.readouterr().out
    for more, kind in ((("--layer", "nowhere"), ModelError), (("--rho", "-1"), UserError)):
        args = arguments(model, *more)
        with pytest.raises(kind):
            args.run(args)
    args = arguments(model, "--plot", str(tmp_path / "v.txt"))
    with pytest.raises(UserError, match="PNG"):
        args.run(args)
    args = arguments(model, "--json", str(tmp_path / "missing" / "v.json"))
    with pytest.raises(UserError, match="missing"):
        args.run(args)
    (tmp_path / "folder.png").mkdir()
    for option in ("--json", "--plot"):
        args = arguments(model, option, str(tmp_path / "folder.png"))
        with pytest.raises(UserError, match=r"folder\.png"):
            args.run(args)
