"""`diplugin score`: profile, stopping rule, and the file it writes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from small_net import own_module

from diplugin.cli import score
from diplugin.errors import UserError


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return own_module("my_scored_net", tmp_path, monkeypatch)


def arguments(model: str, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    score.add_parser(parser.add_subparsers())
    return parser.parse_args(["score", model, "digits", "--example-shape", "1,1,24,24", *more])


def test_scores_profile_and_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for batch in ("32", "300"):
        files.append(tmp_path / f"{batch}.json")
        args = arguments(model, "--images", "500", "--batch-size", batch, "--profile", "--json", str(files[-1]))
        assert args.run(args) == 0
    printed = capsys.readouterr().out
    assert "2 (in)" in printed and "times the pass without" in printed
    first, second = (json.loads(file.read_text()) for file in files)
    assert first["images"] == second["images"] == 500
    assert set(first["scores"]) == {"0", "2"}
    for name in first["scores"]:
        assert first["scores"][name] == pytest.approx(second["scores"][name], rel=1e-5)


def test_a_device_that_is_not_there_is_named(model: str) -> None:
    for device in ("cuda:99", "toaster"):
        args = arguments(model, "--images", "100", "--device", device)
        with pytest.raises(UserError, match=device):
            args.run(args)


def test_until_stable_takes_what_it_needs(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(model, "--until-stable", "0.999999")
    assert args.run(args) == 0  # out of reach: everything is used
    everything = capsys.readouterr().out
    args = arguments(model, "--until-stable", "0.01")
    assert args.run(args) == 0
    stopped = capsys.readouterr().out
    assert "1000 images" in stopped and "1000 images" not in everything
    args = arguments(model, "--until-stable", "2")
    with pytest.raises(UserError, match="reliability"):
        args.run(args)
