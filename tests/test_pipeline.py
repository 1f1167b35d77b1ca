"""The main job from end to end on a tiny network, against the pruned network itself and ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bars import INPUTS
from small_runs import compress, make_net, seen, trained_net, unseen
from small_tables import timed_by_macs

import diplugin
from diplugin.accuracy import accuracy
from diplugin.costs import macs
from diplugin.latency.device import device_model
from diplugin.latency.noted import planned_elsewhere, planned_threads
from diplugin.measurements import Measure
from diplugin.network import trace_network
from diplugin.onnx_inference import run_onnx
from diplugin.recovery import FineTuning, Recalibrate
from diplugin.search import ExactSearch

pytestmark = pytest.mark.usefixtures("brief_timing")


def test_a_run_delivers_what_it_says(tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in trained_net().state_dict().items()}
    out = tmp_path / "run"
    result = compress(trained_net(), seen(), out=out, test_loader=unseen(), recovery=diplugin.Distillation(epochs=1))
    after = trained_net().state_dict()
    assert all(torch.equal(before[k], v) for k, v in after.items()), "the user's model is not changed"
    assert {p.name for p in out.iterdir()} == {
        "config.json", "scores.json", "plan.json", "weights.safetensors", "model.onnx", "metrics.json", "report.html",
        "log.txt",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    counted = macs(trace_network(result.model, INPUTS, verify=False)).base
    assert metrics["recovered"]["macs"] == counted <= 0.5 * metrics["base"]["macs"]
    assert metrics["budgets"][0]["met"] and metrics["budgets"][0]["measured"] == counted
    assert metrics["recovered"]["accuracy"] == accuracy(result.model, unseen())
    assert metrics["recovered"]["accuracy"] > metrics["base"]["accuracy"] - 0.1
    assert metrics["recovered"]["size_mb"] == (out / "model.onnx").stat().st_size / 1e6


def test_a_network_that_got_slower_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller is not faster where a runtime does not like the widths; a user who asked for MACs must hear of it."""
    for after, before, heard in ((2.0, 1.0, True), (1.0, 1.0, False), (2.0, 2.0, False), (None, None, False)):
        said = list[str]()  # unpruned at first, then both in turns, in a minute that may be slower
        monkeypatch.setattr(Measure, "timed", lambda _, *paths, t=(before, after): [1.0] if len(paths) == 1 else [*t])
        result = compress(trained_net(), seen(), out=tmp_path / f"{after} {before}", tell=said.append)
        assert any("slower than unpruned" in line for line in said) == heard
        assert result.metrics["base"]["latency_ms_measured"] == before


def test_what_is_written_is_the_network(tmp_path: Path) -> None:
    result = compress(trained_net(), seen(), out=tmp_path / "run")
    rebuilt = diplugin.load_pruned(make_net(), tmp_path / "run").eval()
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        want = result.model(x)
        assert torch.equal(rebuilt(x), want)
    (got,) = run_onnx(tmp_path / "run" / "model.onnx", (x,))
    assert torch.allclose(torch.from_numpy(got), want, atol=1e-4)


def test_runs_repeat() -> None:
    torch.manual_seed(1)
    one = compress(trained_net(), seen(), recovery=FineTuning(epochs=1))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    two = compress(trained_net(), seen(), recovery=FineTuning(epochs=1))
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's generator is left as it was"
    assert one.plan == two.plan and one.folder is None
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_a_ranking_of_ones_own_says_which_channels_stay() -> None:
    settings = {"recovery": None, "repairs": [Recalibrate()], "ranking": lambda loss, energy, norm: norm}
    result = compress(trained_net(), seen(), **settings)
    narrower = {name: kept for name, kept in result.plan.kept.items() if len(kept) < result.plan.channels[name]}
    assert narrower
    for name, kept in narrower.items():
        norms = trained_net().get_submodule(name).weight.detach().flatten(1).square().sum(1)  # type: ignore[union-attr]
        assert set(kept) == set(norms.topk(len(kept)).indices.tolist())


def test_the_search_can_be_chosen(tmp_path: Path) -> None:
    said: list[str] = []
    budgets = [diplugin.Budget("macs", fraction=0.6), diplugin.Budget("params", fraction=0.5)]
    searched = {"search": ExactSearch(), "out": tmp_path / "run", "tell": said.append}
    exact = compress(trained_net(), seen(), budgets=budgets, **searched)
    greedy = compress(trained_net(), seen(), budgets=budgets)
    assert exact.plan.path[-1].loss <= greedy.plan.path[-1].loss * (1 + 1e-9)
    assert all(budget["met"] for budget in exact.metrics["budgets"])
    assert "proven" in exact.plan.found_by and any("proven" in line for line in said)
    assert "ExactSearch" in json.loads((tmp_path / "run" / "config.json").read_text())["search"]


def test_a_run_tells_what_its_table_was_timed_on(not_exported: None) -> None:
    """A later measurement needs to know whether it runs on the same device, with as many threads."""
    table = timed_by_macs(trained_net(), INPUTS)
    table = replace(table, device="a Pi", setting=replace(table.setting, threads=4))
    metrics, here = (
        compress(trained_net(), seen(), latency_table=known, repairs=(Recalibrate(),)).metrics
        for known in (table, replace(table, provenance={"device": device_model()}))
    )
    assert planned_threads(metrics) == 4 and planned_elsewhere(metrics) == "a Pi"
    assert planned_elsewhere(here) is None
