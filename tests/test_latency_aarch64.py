"""A bundle on 64-bit ARM, emulated: it runs there, and what it measures guides nothing.

`.ci/aarch64 FOLDER` builds the emulated `python3`; DIPLUGIN_AARCH64 names its folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from diplugin.cli import main
from diplugin.costs import LatencyCost
from diplugin.errors import TableError
from diplugin.latency import device, finish
from diplugin.latency.plan import ProfilePlan, Protocol, make_plan, runtime_setting
from diplugin.network import NetworkTrace, trace_network
from diplugin.tables import Alignment, LatencyTable

QUICK = Protocol(
    rounds=2, runs=2, min_runs=1, round_ms=0.2, warmup_ms=0.0, chunk=4, patience=1, gap_ms=0.0, pause_s=0.0, pauses=0
)
INPUTS = (torch.zeros(1, 3, 8, 8),)
SECONDS = 600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "DIPLUGIN_AARCH64" not in os.environ,
        reason="needs an emulated arm64 python3: .ci/aarch64 FOLDER builds it, DIPLUGIN_AARCH64=FOLDER names it",
    ),
]


def small_plan() -> tuple[NetworkTrace, ProfilePlan]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(), nn.Conv2d(16, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    trace = trace_network(model, INPUTS)
    plan = make_plan(model, INPUTS, trace, name="arm", setting=runtime_setting(), alignment=Alignment(8, 8), points=2,
                     nets=10, protocol=QUICK, probes=False)  # fmt: skip
    return trace, plan


def command(*arguments: str | Path) -> list[str]:
    return [str(Path(os.environ["DIPLUGIN_AARCH64"]) / "python3"), *map(str, arguments)]


def test_a_bundle_runs_on_arm_is_killed_goes_on_and_guides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, plan = small_plan()
    bundle, journal = plan.save(tmp_path / "b.pyz"), tmp_path / "b.jsonl"
    begun = subprocess.Popen(command(bundle), cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert begun.stderr is not None
    while (line := begun.stderr.readline()) and line.startswith("0/"):
        pass
    os.kill(begun.pid, signal.SIGKILL)
    begun.communicate()
    kept = journal.read_bytes()
    assert 0 < len(device.read_journal(str(journal))[1]) < len(plan.jobs), "killed in the middle"

    done = subprocess.run(
        command(bundle, "--quiet"), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert journal.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]), "nothing was measured twice"
    table = finish(plan.plan, journal)
    assert table.emulated and table.provenance["machine"] == "aarch64"
    assert table.provenance["runtime_version"] == table.setting.version
    assert table.setting.version.split(".")[0] == onnxruntime.__version__.split(".")[0]
    assert len(table.nets) == 11 and all(entry.latency_ms > 0 for entry in table.entries)

    path = table.save(tmp_path / "arm.json")
    assert LatencyTable.load(path).emulated
    with pytest.raises(TableError, match="emulator"):
        LatencyCost(trace, LatencyTable.load(path))
    assert main(["tables", "check", str(path)]) == 2
    assert "emulator" in capsys.readouterr().err
    assert main(["tables", "show", str(path)]) == 0
    assert "EMULATED" in capsys.readouterr().out
