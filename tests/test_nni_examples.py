"""Every NNI example runs as its docstring says, and what it prints is what was promised."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nni")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(name: str, *options: str, home: Path | None = None) -> str:
    """What the example prints; nothing outside this machine can be reached while it runs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9", "no_proxy": "",
                   "https_proxy": "http://127.0.0.1:9", "NO_PROXY": ""}  # fmt: skip
    if home is not None:
        environment["HOME"] = str(home)
    done = subprocess.run([sys.executable, str(ROOT / "examples" / f"{name}.py"), *options], env=environment,
                          capture_output=True, text=True, timeout=900, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def percents(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(\d+\.\d)%", text)]


def parameters(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) parameters", text)]


def test_one_shot() -> None:
    printed = run("nni_one_shot")
    base, masked, sped_up, recalibrated, tuned = percents(printed)
    assert masked == sped_up
    assert base > 95
    assert tuned > max(base - 3, recalibrated, 90)
    before, after = parameters(printed)
    assert after < 0.3 * before
    assert float(printed.partition("largest change of a logit ")[2].split()[0]) < 1e-5


def test_agp_and_distillation() -> None:
    printed = run("nni_agp_distill")
    teacher, masked, sped_up = percents(printed)
    assert masked == sped_up > teacher - 8
    before, after = parameters(printed)
    assert after < 0.25 * before


def test_experiment(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from digits import DigitNet, accuracy, loaders
    finally:
        sys.path.pop(0)
    from diplugin.surgery import load_pruned

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    home, folder = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    printed = run("nni_experiment", "--folder", str(folder), "--port", str(port), "--trials", "4", home=home)
    outcomes = json.loads((folder / "outcomes.json").read_text())
    assert len(outcomes) == 4
    base_ms, best_ms = (float(ms) for ms in re.findall(r"(\d+\.\d+) ms", printed))
    assert all(outcome["cost"] <= 0.7 * base_ms + 1e-3 for outcome in outcomes)
    assert min(abs(outcome["cost"] - best_ms) for outcome in outcomes) < 1e-3
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")
    model = load_pruned(DigitNet(), folder / "best")
    assert accuracy(model, loaders()[2]) * 100 == pytest.approx(percents(printed)[1], abs=0.06)
    manifest = json.loads((home / "nni-experiments" / ".experiment").read_text())
    for entry in manifest.values():
        with pytest.raises(ProcessLookupError):
            os.killpg(int(entry["pid"]), 0)
