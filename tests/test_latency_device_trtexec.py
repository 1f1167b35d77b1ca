"""trtexec behind the face of a runtime, with recorded output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small_profiles import FAST

from diplugin.latency import device
from diplugin.latency.device.trtexec import Trtexec, trtexec_times, trtexec_version
from diplugin.latency.finish import table_from_rows
from diplugin.latency.plan import ProfilePlan, add_entries
from diplugin.tables import OpKey, Setting

RECORDED = """#!/bin/sh
case "$*" in *--help*) echo "&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --help"; exit 0;; esac
for word; do case "$word" in
  --exportTimes=*) echo '[{"computeMs": 0.4}, {"computeMs": 0.5}]' > "${word#*=}";;
  --saveEngine=*) touch "${word#*=}";;
  --onnx=*) test -s "${word#*=}" || exit 1;;
esac; done
echo "$@" >> "$(dirname "$0")/calls"
"""


def test_trtexec_stands_behind_the_same_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text(RECORDED)
    tool.chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(tool))
    plan = ProfilePlan("jetson", Setting("trtexec", "", "TensorRT-fp16", "all", 1), FAST)
    key = OpKey("conv", 8, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1, (2, 2))
    add_entries(plan, [key, replace(key, dtype="int8")])
    rows = device.profile(device.Bundle(plan.save(tmp_path / "b.pyz")), str(tmp_path / "j")).rows
    assert plan.count("edge") == 0 and set(rows) == {job.id for job in plan.jobs}
    assert all(row["wall_ms"] == 0.4 for row in rows.values())
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("--onnx=" in call for call in calls) and all("--fp16" in call for call in calls if "--onnx=" in call)
    assert sum("--loadEngine=" in call for call in calls)
    assert sum("--int8" in call for call in calls) == 1, "the one engine with quantized layers"
    table = table_from_rows(plan.plan, rows, device.read_journal(str(tmp_path / "j"))[0]["provenance"])
    assert table.setting.version == "8.5.2"


def test_trtexec_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "trtexec"
    tool.write_text("#!/bin/sh\ncase $* in *help*) echo v8502;; *) echo out of memory; exit 1;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("TRTEXEC", str(tool))
    runtime = Trtexec({"provider": "TensorRT"})
    with pytest.raises(device.ProfileError, match="out of memory"):
        runtime.load(b"x", []).times(3)
    monkeypatch.setenv("TRTEXEC", str(tmp_path / "none"))
    with pytest.raises(device.ProfileError, match="found none"):
        Trtexec({"provider": "TensorRT"})


def test_trtexec_times_and_version() -> None:
    recorded = json.dumps(
        [
            {"startComputeMs": 1.0, "endComputeMs": 1.4, "computeMs": 0.4, "latencyMs": 0.5},
            {"startComputeMs": 2.0, "endComputeMs": 2.5, "computeMs": 0.5, "latencyMs": 0.6},
        ]
    )
    assert trtexec_times(recorded) == [0.4, 0.5]
    assert trtexec_version("&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --help") == "8.5.2"
    assert trtexec_version("[TensorRT v100300]") == "10.3.0"
    for text in ("", "{}", "[]", '[{"latencyMs": 1}]', '[{"computeMs": -1}]', '[{"computeMs": "x"}]', "[[]]", "null"):
        with pytest.raises(device.ProfileError):
            trtexec_times(text)
