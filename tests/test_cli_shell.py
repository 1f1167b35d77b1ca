"""The shell of the command line: help, arguments, interruptions, and what is said at the end."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diplugin.cli import COMMANDS, build_parser, main
from diplugin.cli.common import print_metrics

SEEDED = [["compress", "a:b", "digits", "--example-shape=1,1", "--budget=macs=.5", "--out=x"],
          ["compare", "a:b", "digits", "--example-shape=1,1"], ["validate", "a:b", "digits", "--example-shape=1,1"],
          ["quantize", "run", "digits", "--budget=size_mb=.5"]]  # fmt: skip


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_everywhere(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    assert "usage: diplugin" in capsys.readouterr().out


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


def test_every_argument_says_what_it_is_and_its_default() -> None:
    for parser in parsers(build_parser()):
        for action in parser._actions:
            said, default = action.help, action.default
            if isinstance(action, argparse._SubParsersAction) or said == argparse.SUPPRESS:
                continue
            assert said, (parser.prog, action.dest)
            if isinstance(default, (int, float)) and not isinstance(default, bool) and default:
                assert f"{default:g}" in said, (parser.prog, action.dest)
            if isinstance(default, str) and default not in ("", argparse.SUPPRESS):
                assert default in said, (parser.prog, action.dest)


def test_budgets_are_told_in_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    found = [{"cost": "macs", "asked": 2_298_385.4, "predicted": 2_179_000, "measured": 2_179_000, "met": True},
             {"cost": "latency_ms", "asked": 0.9612, "predicted": 0.8225, "measured": None, "met": True},
             {"cost": "memory_mb", "asked": 0.07, "predicted": 0.0672, "measured": 0.0772, "met": False}]  # fmt: skip
    print_metrics({"budgets": found})
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "budget macs <= 2.30 M: predicted 2.18 M, measured 2.18 M: met",
        "budget latency_ms <= 0.961 ms: predicted 0.823 ms, not measured: met",
        "budget memory_mb <= 0.0700 MB: predicted 0.0672 MB, measured 0.0772 MB: NOT met",
    ]


@pytest.mark.parametrize(
    "argv",
    [[], ["nope"], ["compress"], ["compress", "a:b", "digits"],
     ["score", "a:b", "digits", "--example-shape=1,1", "--images=0"], ["tables", "show", "table", "--rows=-1"],
     ["compress", "a:b", "digits", "--example-shape=1,1", "--budget=macs=.5", "--out=x", "--seed=one"],
     *([*command, f"--seed={seed}"] for seed in (-1, 2**32, "9" * 30) for command in SEEDED)],
    ids=" ".join,
)  # fmt: skip
def test_arguments_that_do_not_parse(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_parser_knows_every_command() -> None:
    assert all(name in build_parser().format_help() for name in COMMANDS)


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from diplugin.cli import score

    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(score, "run", stop)
    assert main(["score", "a:b", "digits", "--example-shape=1,1,8,8"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_as_a_module(tmp_path: Path) -> None:
    """`python -m diplugin` ends with the exit code, and shows no traceback."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "diplugin", "compress", "nope:Net", "digits", "--example-shape=1,1,8,8",
               "--budget=macs=0.5", f"--out={tmp_path / 'run'}"]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("diplugin: expected a module 'nope'")
    assert not (tmp_path / "run").exists()
