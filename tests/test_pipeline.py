"""The main job from end to end on a tiny network, against the pruned network itself and ONNX Runtime."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bars import CLASSES, INPUTS, bars
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diplugin
from diplugin.accuracy import accuracy
from diplugin.configuration import Configuration
from diplugin.costs import macs
from diplugin.costs.latency import timed_layers
from diplugin.errors import BudgetError, DataError, InfeasibleBudget, ModelError, PlanError, UserError
from diplugin.latency.device import device_model
from diplugin.latency.grid import group_grids, layer_keys
from diplugin.latency.noted import planned_elsewhere, planned_threads
from diplugin.measurements import Measure
from diplugin.network import trace_network
from diplugin.onnx_inference import run_onnx
from diplugin.recovery import FineTuning, Recalibrate, train
from diplugin.search import ExactSearch
from diplugin.strategies import OneShot
from diplugin.tables import Alignment, Calibration, Entry, LatencyTable, Setting

pytestmark = pytest.mark.usefixtures("brief_timing")

HALF = diplugin.Budget("macs", fraction=0.5)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, CLASSES),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    loader = DataLoader(bars(400, 1), batch_size=50, shuffle=True)
    return train(make_net(), loader, FineTuning(epochs=3, lr=0.05)).eval()


@pytest.fixture
def loader() -> DataLoader[Any]:
    return DataLoader(bars(400, 1), batch_size=50)


@pytest.fixture(scope="module")
def test_loader() -> DataLoader[Any]:
    return DataLoader(bars(200, 2), batch_size=100)


def compress(model: nn.Module, loader: Any, **settings: Any) -> diplugin.CompressionResult:
    return diplugin.compress(model, loader, **{"example_inputs": INPUTS, "budgets": [HALF], **settings})


def test_a_ranking_of_ones_own_says_which_channels_stay(trained: nn.Module, loader: Any) -> None:
    result = compress(trained, loader, recovery=None, repairs=[Recalibrate()], ranking=lambda loss, energy, norm: norm)
    narrower = {name: kept for name, kept in result.plan.kept.items() if len(kept) < result.plan.channels[name]}
    assert narrower
    for name, kept in narrower.items():
        norms = trained.get_submodule(name).weight.detach().flatten(1).square().sum(1)  # type: ignore[union-attr]
        assert set(kept) == set(norms.topk(len(kept)).indices.tolist())


def test_a_run_delivers_what_it_says(trained: nn.Module, loader: Any, test_loader: Any, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in trained.state_dict().items()}
    out = tmp_path / "run"
    result = compress(trained, loader, out=out, test_loader=test_loader, recovery=diplugin.Distillation(epochs=1))
    assert all(torch.equal(before[k], v) for k, v in trained.state_dict().items()), "the user's model is not changed"
    assert {p.name for p in out.iterdir()} == {
        "config.json", "scores.json", "plan.json", "weights.safetensors", "model.onnx", "metrics.json", "report.html",
        "log.txt",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    counted = macs(trace_network(result.model, INPUTS, verify=False)).base
    assert metrics["recovered"]["macs"] == counted <= 0.5 * metrics["base"]["macs"]
    assert metrics["budgets"][0]["met"] and metrics["budgets"][0]["measured"] == counted
    assert metrics["recovered"]["accuracy"] == accuracy(result.model, test_loader)
    assert metrics["recovered"]["accuracy"] > metrics["base"]["accuracy"] - 0.1
    assert metrics["recovered"]["size_mb"] == (out / "model.onnx").stat().st_size / 1e6


def test_a_network_that_got_slower_is_told_so(
    trained: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller is not faster where a runtime does not like the widths; a user who asked for MACs must hear of it."""
    for after, before, heard in ((2.0, 1.0, True), (1.0, 1.0, False), (2.0, 2.0, False), (None, None, False)):
        said = list[str]()  # unpruned at first, then both in turns, in a minute that may be slower
        monkeypatch.setattr(Measure, "timed", lambda _, *paths, t=(before, after): [1.0] if len(paths) == 1 else [*t])
        result = compress(trained, loader, out=tmp_path / f"{after} {before}", tell=said.append)
        assert any("slower than unpruned" in line for line in said) == heard
        assert result.metrics["base"]["latency_ms_measured"] == before


def test_what_is_written_is_the_network(trained: nn.Module, loader: Any, tmp_path: Path) -> None:
    result = compress(trained, loader, out=tmp_path / "run")
    rebuilt = diplugin.load_pruned(make_net(), tmp_path / "run").eval()
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        want = result.model(x)
        assert torch.equal(rebuilt(x), want)
    (got,) = run_onnx(tmp_path / "run" / "model.onnx", (x,))
    assert torch.allclose(torch.from_numpy(got), want, atol=1e-4)


class Killed(BaseException):
    """Stands for a signal: no handler of the pipeline's may swallow it."""


def test_a_killed_run_ends_like_one_that_was_not(trained: nn.Module, loader: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recovery": diplugin.Distillation(epochs=3), "repairs": (Recalibrate(),)}
    whole = compress(trained, loader, out=tmp_path / "whole", **settings)

    def kill(line: str) -> None:
        if line.startswith("epoch 2"):
            raise Killed

    with pytest.raises(Killed):
        compress(trained, loader, out=tmp_path / "cut", tell=kill, **settings)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    with pytest.raises(PlanError, match="--resume"):
        compress(trained, loader, out=tmp_path / "cut", **settings)
    lines: list[str] = []
    resumed = compress(trained, loader, out=tmp_path / "cut", resume=True, tell=lines.append, **settings)
    assert [line[:7] for line in lines if line.startswith("epoch")] == ["epoch 3"], "finished epochs are not repeated"
    assert resumed.plan == whole.plan
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture
def not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX files are other tests' affair, and take seconds each."""
    monkeypatch.setattr(Measure, "exported", lambda *_: {"size_mb": 0.1})
    monkeypatch.setattr(Measure, "timed", lambda _, *paths: [None] * len(paths))


def killed_at(beginning: str, model: nn.Module, loader: Any, out: Path, **settings: Any) -> None:
    """Leave a run in `out` that was killed once it told a line that begins like this."""

    def kill(line: str) -> None:
        if line.startswith(beginning):
            raise Killed

    with pytest.raises(Killed):
        compress(model, loader, out=out, tell=kill, **settings)


def test_another_network_does_not_take_up_a_run(
    trained: nn.Module, loader: Any, tmp_path: Path, not_exported: None
) -> None:
    killed_at("traced", trained, loader, tmp_path / "run")
    other = copy.deepcopy(trained)
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(PlanError, match="settings of the run to resume, 'weights' was"):
        compress(other, loader, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_record_tells_apart_what_differs_in_the_last_digit(trained: nn.Module) -> None:
    setting = Setting("onnxruntime", "1", "CPUExecutionProvider", "all", 1)
    table = LatencyTable("desk", "bench", setting, ())

    def record(limit: float = 1234567.0, table: LatencyTable = table, **kind: float) -> dict[str, Any]:
        budget = diplugin.Budget("macs", **(kind or {"limit": limit}))
        return Configuration((budget,), OneShot(), latency_table=table).record(trained)

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
def test_a_plan_that_was_edited_is_not_taken_up(
    trained: nn.Module, loader: Any, tmp_path: Path, not_exported: None, edit: Any
) -> None:
    killed_at("pruned", trained, loader, tmp_path / "run", repairs=(Recalibrate(),))
    path = tmp_path / "run" / "plan.json"
    plan = json.loads(path.read_text())
    edit(plan)
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=r"expected a plan for this network and its costs in .*plan\.json"):
        compress(trained, loader, out=tmp_path / "run", resume=True, repairs=(Recalibrate(),))
    assert json.loads(path.read_text()) == plan


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 0.5])
def test_a_seed_that_generators_do_not_take(trained: nn.Module, loader: Any, tmp_path: Path, seed: Any) -> None:
    with pytest.raises(UserError, match="expected a seed from 0"):
        compress(trained, loader, out=tmp_path / "run", seed=seed)
    assert not (tmp_path / "run").exists()


def test_an_error_of_any_kind_leaves_a_folder_that_can_be_started(
    trained: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise OverflowError("too large")

    monkeypatch.setattr(Measure, "base", broken)
    with pytest.raises(OverflowError):
        compress(trained, loader, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_repeat(trained: nn.Module, loader: Any) -> None:
    torch.manual_seed(1)
    one = compress(trained, loader, recovery=FineTuning(epochs=1))
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    two = compress(trained, loader, recovery=FineTuning(epochs=1))
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's generator is left as it was"
    assert one.plan == two.plan and one.folder is None
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_the_search_can_be_chosen(trained: nn.Module, loader: Any, tmp_path: Path) -> None:
    said: list[str] = []
    budgets = [diplugin.Budget("macs", fraction=0.6), diplugin.Budget("params", fraction=0.5)]
    exact = compress(trained, loader, budgets=budgets, search=ExactSearch(), out=tmp_path / "run", tell=said.append)
    greedy = compress(trained, loader, budgets=budgets)
    assert exact.plan.path[-1].loss <= greedy.plan.path[-1].loss * (1 + 1e-9)
    assert all(budget["met"] for budget in exact.metrics["budgets"])
    assert "proven" in exact.plan.found_by and any("proven" in line for line in said)
    assert "ExactSearch" in json.loads((tmp_path / "run" / "config.json").read_text())["search"]


def test_an_infeasible_budget_names_what_is_in_reach_and_leaves_nothing(
    trained: nn.Module, loader: Any, tmp_path: Path
) -> None:
    budgets = [diplugin.Budget("macs", fraction=1e-4)]
    with pytest.raises(InfeasibleBudget, match="cheapest"):
        compress(trained, loader, budgets=budgets, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_budgets_on_latency_need_a_table(trained: nn.Module, loader: Any) -> None:
    with pytest.raises(BudgetError, match="latency table"):
        compress(trained, loader, budgets=[diplugin.Budget("latency_ms", limit=1.0)])


def test_a_run_tells_what_its_table_was_timed_on(trained: nn.Module, loader: Any, not_exported: None) -> None:
    """A later measurement needs to know whether it runs on the same device, with as many threads."""
    trace, alignment = trace_network(trained, INPUTS), Alignment(2, 2)
    widths = group_grids(trace, alignment)
    keys = {key for layer in timed_layers(trace) for key in layer_keys(layer, widths, trace.base_widths)}
    setting = Setting("onnxruntime", "1", "CPUExecutionProvider", "all", 4)
    table = LatencyTable("made-up", "a Pi", setting, tuple(Entry(key, key.macs * 1e-5, 1.0, 1.0, 0.0) for key in keys),
                         alignment=alignment, calibration=Calibration(1, 0, 12, 0.01, 0.03, 1))  # fmt: skip
    metrics = compress(trained, loader, latency_table=table, repairs=(Recalibrate(),)).metrics
    assert planned_threads(metrics) == 4 and planned_elsewhere(metrics) == "a Pi"
    here = replace(table, provenance={"device": device_model()})
    assert planned_elsewhere(compress(trained, loader, latency_table=here, repairs=(Recalibrate(),)).metrics) is None


def test_no_budget(trained: nn.Module, loader: Any) -> None:
    with pytest.raises(BudgetError, match="got none"):
        compress(trained, loader, budgets=[])


class Pair(nn.Module):
    """Returns a tuple, which is no tensor of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net(x)
        return y, y


def test_a_model_that_returns_a_tuple(loader: Any) -> None:
    with pytest.raises(ModelError, match=r"one tensor of logits.*tuple"):
        compress(Pair(), loader)


def test_a_model_that_returns_a_tuple_with_a_forward_of_its_own(loader: Any) -> None:
    result = compress(Pair(), loader, forward=lambda model, batch: model(batch[0])[0])
    assert result.metrics["budgets"][0]["met"]


def test_a_model_without_channels_to_remove(loader: Any) -> None:
    with pytest.raises(ModelError, match="can be removed"):
        compress(nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)), loader)


def labelled(change: Any) -> DataLoader[Any]:
    x, y = bars(100, 1).tensors
    x, y = change(x.clone(), y.clone())
    return DataLoader(TensorDataset(x, y), batch_size=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, torch.zeros_like(y)), "differ|same"),
        (lambda x, y: (x, y + CLASSES), "class ids from 0"),
        (lambda x, y: (x, y - CLASSES), "class ids"),
        (lambda x, y: (x * float("nan"), y), "NaN"),
        (lambda x, y: (x[:1], y[:1]), "four images"),
        (lambda x, y: (x[:, :, :, :4], y), "runs|shape|size"),
        (lambda x, y: (x, y.float()), "integers"),
    ],
    ids=["one class", "ids too high", "ids below zero", "NaN", "one image", "wrong shape", "float ids"],
)
def test_data_that_cannot_be_used(trained: nn.Module, change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((DataError, ModelError), match=message):
        compress(trained, labelled(change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("data", [[], [(torch.zeros(4, 1, 8, 8),)], [{"x": torch.zeros(4, 1, 8, 8)}]])
def test_batches_of_another_form(trained: nn.Module, data: Any) -> None:
    with pytest.raises(DataError, match="expected"):
        compress(trained, data)


class Broken(TensorDataset):
    """Its tenth image cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        if index == 10:
            raise OSError("truncated file")
        return super().__getitem__(index)


def test_a_data_set_that_raises(trained: nn.Module, tmp_path: Path) -> None:
    loader = DataLoader(Broken(*bars(40, 1).tensors), batch_size=20)
    with pytest.raises(DataError, match="OSError: truncated file"):
        compress(trained, loader, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
