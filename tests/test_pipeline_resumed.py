"""Runs that were killed end like others, and nothing but the same run is taken up."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import Killed, compress, seen, trained_net
from torch import nn

import diplugin
from diplugin.configuration import Configuration
from diplugin.errors import PlanError
from diplugin.recovery import Recalibrate
from diplugin.strategies import OneShot
from diplugin.tables import LatencyTable, Setting

pytestmark = pytest.mark.usefixtures("nothing_is_exported")


def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recovery": diplugin.Distillation(epochs=3), "repairs": (Recalibrate(),)}
    whole = compress(trained_net(), seen(), out=tmp_path / "whole", **settings)

    def kill(line: str) -> None:
        if line.startswith("epoch 2"):
            raise Killed

    with pytest.raises(Killed):
        compress(trained_net(), seen(), out=tmp_path / "cut", tell=kill, **settings)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    with pytest.raises(PlanError, match="--resume"):
        compress(trained_net(), seen(), out=tmp_path / "cut", **settings)
    lines: list[str] = []
    resumed = compress(trained_net(), seen(), out=tmp_path / "cut", resume=True, tell=lines.append, **settings)
    assert [line[:7] for line in lines if line.startswith("epoch")] == ["epoch 3"], "finished epochs are not repeated"
    assert resumed.plan == whole.plan
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def killed_at(beginning: str, model: nn.Module, loader: Any, out: Path, **settings: Any) -> None:
    """Leave a run in `out` that was killed once it told a line that begins like this."""

    def kill(line: str) -> None:
        if line.startswith(beginning):
            raise Killed

    with pytest.raises(Killed):
        compress(model, loader, out=out, tell=kill, **settings)


def test_another_network_does_not_take_up_a_run(tmp_path: Path) -> None:
    killed_at("traced", trained_net(), seen(), tmp_path / "run")
    other = copy.deepcopy(trained_net())
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(PlanError, match="settings of the run to resume, 'weights' was"):
        compress(other, seen(), out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_record_tells_apart_what_differs_in_the_last_digit() -> None:
    setting = Setting("onnxruntime", "1", "CPUExecutionProvider", "all", 1)
    table = LatencyTable("desk", "bench", setting, ())

    def record(limit: float = 1234567.0, table: LatencyTable = table, **kind: float) -> dict[str, Any]:
        budget = diplugin.Budget("macs", **(kind or {"limit": limit}))
        return Configuration((budget,), OneShot(), latency_table=table).record(trained_net())

    assert record() == record()
    assert record() != record(limit=1234568.0)
    assert record(fraction=0.5) != record(fraction=0.5000001)
    assert record() != record(table=replace(table, overhead_ms=0.1))


@pytest.mark.parametrize(
    "edit",
    [
        lambda plan: plan.update(costs={}),
        lambda plan: plan.update(groups={}),
        lambda plan: plan["groups"].update(more={"channels": 4, "kept": [0]}),
        lambda plan: plan["costs"]["macs"].update(predicted=1.0),
        lambda plan: plan["costs"]["macs"].update(base=1.0),
        lambda plan: plan.update(inputs=[]),
        lambda plan: next(iter(plan["groups"].values())).update(kept=[0]),
    ],
    ids=["no costs", "no groups", "one group more", "another cost", "another base", "no inputs", "other channels"],
)
def test_a_plan_that_was_edited_is_not_taken_up(tmp_path: Path, edit: Any) -> None:
    killed_at("pruned", trained_net(), seen(), tmp_path / "run", repairs=(Recalibrate(),))
    path = tmp_path / "run" / "plan.json"
    plan = json.loads(path.read_text())
    edit(plan)
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=r"expected a plan for this network and its costs in .*plan\.json"):
        compress(trained_net(), seen(), out=tmp_path / "run", resume=True, repairs=(Recalibrate(),))
    assert json.loads(path.read_text()) == plan


def test_a_finished_run_is_neither_trained_again_nor_touched(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"repairs": (Recalibrate(),), "out": tmp_path / "run"}
    compress(trained_net(), seen(), **settings)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    told: list[str] = []
    with pytest.raises(PlanError, match=r"the one in .*run is finished; choose another folder") as caught:
        compress(trained_net(), seen(), resume=True, tell=told.append, **settings)
    assert not told and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
