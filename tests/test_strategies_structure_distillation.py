"""Structure distillation: budgets met, plans that compose, one step that is one shot, and runs that survive a kill."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bars import INPUTS, bars, make_bars_net, trained_on_bars
from safetensors.torch import load_file
from small_tables import timed_by_macs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import diplugin
from diplugin.costs import macs, params
from diplugin.errors import BudgetError, DataError, InfeasibleBudget, PlanError, UserError
from diplugin.measurements import Measure
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import (
    Distillation,
    FeatureDistillation,
    FineTuning,
    Recalibrate,
    Reconstruct,
)
from diplugin.scoring import score_groups
from diplugin.search import FixedScores, greedy_search
from diplugin.strategies import Geometric, Linear, StructureDistillation
from diplugin.tables import LatencyTable

pytestmark = pytest.mark.usefixtures("nothing_is_exported")
MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
HALF = diplugin.Budget("macs", fraction=0.4)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return trained_on_bars()


@pytest.fixture(scope="module")
def loader() -> DataLoader[Any]:
    return DataLoader(bars(300, 1), batch_size=50)


def compress(model: nn.Module, loader: Any, **settings: Any) -> diplugin.CompressionResult:
    quick = {"example_inputs": INPUTS, "budgets": [HALF], "repairs": (Reconstruct(),), "holdout": 0.2}
    return diplugin.compress(model, loader, **{**quick, **settings})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "weights.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# --- plans ---


def test_a_plan_since_another_is_then_undone() -> None:
    channels = {"a": 6, "b": 4}
    one = PruningPlan({"a": (0, 2, 3, 5), "b": (0, 1, 2, 3)}, channels)
    two = PruningPlan({"a": (2, 5), "b": (1, 3)}, channels)
    rest = two.since(one)
    assert rest.kept == {"a": (1, 3), "b": (1, 3)} and rest.channels == one.widths
    assert one.then(rest).kept == two.kept
    assert two.since(two).widths == two.widths
    with pytest.raises(PlanError, match="keeps all"):
        one.since(two)


def test_a_search_goes_on_from_where_another_ended(trained: nn.Module, loader: Any) -> None:
    trace = trace_network(trained, INPUTS)
    costs = [macs(trace), params(trace)]
    scores = FixedScores(trace.prunable, score_groups(trained, loader, trace.groups).scores)
    first = greedy_search(trace, scores, costs, [diplugin.Budget("macs", fraction=0.6)])
    drawn = {g.name: torch.rand(g.channels, dtype=torch.float64) for g in trace.prunable}
    tighter = [diplugin.Budget("macs", fraction=0.3), diplugin.Budget("params", fraction=0.4)]
    second = greedy_search(trace, FixedScores(trace.prunable, drawn), costs, tighter, start=first)
    assert all(set(second.kept[n]) <= set(first.kept[n]) for n in first.kept)
    assert second.costs["macs"].base == costs[0].base and second.costs["macs"].fraction <= 0.3
    assert second.costs["params"].predicted == costs[1].cost(second.widths) <= 0.4 * costs[1].base
    losses = [point.loss for point in second.path]
    assert losses[: len(first.path)] == [p.loss for p in first.path], "what was given up before is not forgotten"
    again = greedy_search(trace, scores, costs, [diplugin.Budget("macs", fraction=0.6)], start=first)
    assert again.kept == first.kept


# --- the strategy ---


STEPS = StructureDistillation(Geometric(3), lesson=FeatureDistillation(epochs=2, lr=0.01), rescore=True)


@pytest.fixture(scope="module")
def whole(trained: nn.Module, loader: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[str]]:
    """A run that nobody killed."""
    out, lines = tmp_path_factory.mktemp("whole") / "run", []
    result = compress(trained, loader, strategy=STEPS, recovery=Distillation(epochs=1), out=out, tell=lines.append)
    return result, out, lines


def test_budgets_are_met_step_by_step(whole: Any, trained: nn.Module) -> None:
    result, out, lines = whole
    assert result.metrics["budgets"][0]["met"]
    counted = macs(trace_network(result.model, INPUTS, verify=False)).base
    assert counted == result.plan.costs["macs"].predicted <= 0.4 * result.metrics["base"]["macs"]
    rows = result.metrics["steps"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row, limit in zip(rows, (0.4 ** (1 / 3), 0.4 ** (2 / 3), 0.4), strict=True):
        share = row["costs"]["macs"]["predicted"] / row["costs"]["macs"]["base"]
        assert limit - 0.15 < share <= limit
    assert all(row["accuracy_taught"] is not None for row in rows[:-1]) and rows[-1]["accuracy_taught"] is None
    assert sum("holdout accuracy" in line for line in lines) == 5
    assert sum("macs" in line and "params" in line for line in lines) == 3
    assert not (out / "stages").exists()


def test_the_final_plan_and_weights_are_the_network_in_hand(whole: Any) -> None:
    result, out, _ = whole
    rebuilt = diplugin.load_pruned(make_bars_net(), out).eval()
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), result.model(x))
    assert PruningPlan.load(out / "plan.json") == result.plan
    assert result.plan.channels == trace_network(make_bars_net(), INPUTS).base_widths


def test_without_lessons_the_weights_are_the_unpruned_ones(trained: nn.Module, loader: Any) -> None:
    """Recalibration touches no weight, so after three cuts each one still sits where the final plan says."""
    result = compress(trained, loader, repairs=(Recalibrate(),), strategy=StructureDistillation(Linear(3), lesson=None))
    direct = diplugin.apply_plan(copy.deepcopy(trained), result.plan, INPUTS)
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), result.model.parameters(), strict=True))
    kept = [row["costs"]["macs"]["predicted"] for row in result.metrics["steps"]]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3


@pytest.mark.parametrize("kind", ["grouped", "dense", "depthwise", "option_a", "vgg", "tokens", "twice"])
def test_numbers_stay_those_of_the_unpruned_network(make_net: MakeNet, make_images: Any, kind: str) -> None:
    """Blocks of grouped convolutions, concatenations, flattened maps: scored anew and cut three times over."""
    model, inputs = make_net(kind)
    result = compress(
        model, make_images(80).loader(40), example_inputs=inputs, repairs=(Recalibrate(),),
        budgets=[diplugin.Budget("params", fraction=0.5)],
        strategy=StructureDistillation(Linear(3), lesson=None, rescore=True),
    )  # fmt: skip
    direct = diplugin.apply_plan(copy.deepcopy(model), result.plan, inputs)
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), result.model.parameters(), strict=True))
    assert result.metrics["budgets"][0]["met"] and len(result.metrics["steps"]) == 3


class Killed(BaseException):
    """Stands for a signal."""


STAGES = ["step 1 of 3: macs", "step 1 of 3: holdout accuracy", "step 1, epoch 1 of 2", "step 1, epoch 2 of 2",
          "after the lesson", "step 2 of 3: macs", "step 2, epoch 1 of 2", "step 3 of 3: macs",
          "step 3 of 3: holdout accuracy", "pruned: ", "epoch 1 of 1", "recovered: "]  # fmt: skip


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(
    whole: Any, trained: nn.Module, loader: Any, tmp_path: Path
) -> None:
    """Killed once at every stage boundary in turn, resumed each time, in one folder."""
    settings: dict[str, Any] = {"strategy": STEPS, "recovery": Distillation(epochs=1), "out": tmp_path / "run"}
    for number, stage in enumerate(STAGES):
        torch.manual_seed(number)

        def kill(line: str, stage: str = stage) -> None:
            if stage in line:
                raise Killed

        with pytest.raises(Killed):
            compress(trained, loader, **settings, resume=number > 0, tell=kill)
    lines: list[str] = []
    result = compress(trained, loader, **settings, resume=True, tell=lines.append)
    assert not any(line.startswith(("step", "epoch")) for line in lines), "nothing is done twice"
    reference, out, _ = whole
    assert result.plan == reference.plan
    assert same(weights(tmp_path / "run"), weights(out))
    assert result.metrics["steps"] == reference.metrics["steps"]


def test_data_that_fails_on_the_way_loses_nothing(whole: Any, trained: nn.Module, loader: Any, tmp_path: Path) -> None:
    """A disk that comes back: the run is resumed and ends like one whose data never failed."""

    class Flaky(Dataset[Any]):
        fails = False

        def __len__(self) -> int:
            return len(loader.dataset)

        def __getitem__(self, index: int) -> Any:
            if self.fails:
                raise OSError("the disk is gone")
            return loader.dataset[index]

    data = Flaky()
    settings: dict[str, Any] = {"strategy": STEPS, "recovery": Distillation(epochs=1), "out": tmp_path / "run"}

    def fail(line: str) -> None:
        data.fails = line.startswith("step 2, epoch 1")

    with pytest.raises(DataError, match="OSError: the disk is gone"):
        compress(trained, DataLoader(data, 50), **settings, tell=fail)
    data.fails, lines = False, list[str]()
    result = compress(trained, DataLoader(data, 50), **settings, resume=True, tell=lines.append)
    assert not any(line.startswith("step 1") for line in lines)
    assert result.plan == whole[0].plan and same(weights(tmp_path / "run"), weights(whole[1]))


@pytest.mark.parametrize("damage", [{"costs": {}}, {"groups": {}}, None])
def test_a_steps_plan_that_is_not_this_networks_is_refused(
    damage: dict[str, Any] | None, trained: nn.Module, loader: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy": StructureDistillation(Linear(2), lesson=None), "out": tmp_path / "run"}

    def kill(line: str) -> None:
        if line.startswith("step 2 of 2: macs"):
            raise Killed

    with pytest.raises(Killed):
        compress(trained, loader, **settings, tell=kill)
    path = tmp_path / "run" / "stages" / "step-1.plan.json"
    if damage is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    with pytest.raises(PlanError, match=r"expected .*plan.*; use another folder"):
        compress(trained, loader, **settings, resume=True)


def test_a_resumed_run_is_held_to_its_strategy(whole: Any, trained: nn.Module, loader: Any) -> None:
    _, out, _ = whole
    other = StructureDistillation(Geometric(2), STEPS.lesson)
    with pytest.raises(PlanError, match="'strategy' was"):
        compress(trained, loader, strategy=other, recovery=Distillation(epochs=1), out=out, resume=True)


def test_one_step_is_one_shot(trained: nn.Module, loader: Any) -> None:
    once = compress(trained, loader)
    one_step = compress(trained, loader, strategy=StructureDistillation(Geometric(1)))
    assert once.plan == one_step.plan
    assert same(dict(once.model.state_dict()), dict(one_step.model.state_dict()))
    assert "steps" not in once.metrics and len(one_step.metrics["steps"]) == 1


@pytest.mark.parametrize("rescore", [False, True])
def test_several_budgets_at_once(trained: nn.Module, loader: Any, rescore: bool) -> None:
    budgets = [diplugin.Budget("macs", fraction=0.6), diplugin.Budget("params", limit=800.0),
               diplugin.Budget("memory_mb", fraction=1.0)]  # fmt: skip
    strategy = StructureDistillation(Linear(2), FineTuning(epochs=1, lr=0.01), rescore=rescore)
    result = compress(trained, loader, budgets=budgets, strategy=strategy)
    assert all(budget["met"] for budget in result.metrics["budgets"])


def test_an_infeasible_budget_is_found_out_before_the_first_step(
    trained: nn.Module, loader: Any, tmp_path: Path
) -> None:
    lines: list[str] = []
    with pytest.raises(InfeasibleBudget, match="cheapest"):
        compress(trained, loader, budgets=[diplugin.Budget("macs", fraction=1e-4)], strategy=STEPS,
                 out=tmp_path / "run", tell=lines.append)  # fmt: skip
    assert not any(line.startswith("step") for line in lines) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [{"schedule": 3}, {"schedule": Linear(2), "lesson": 1}])
def test_settings_of_another_kind(wrong: Any) -> None:
    with pytest.raises(UserError, match="expected a schedule") as caught:
        StructureDistillation(**wrong)
    assert "\n" not in str(caught.value)


def test_a_strategy_of_another_kind(trained: nn.Module, loader: Any) -> None:
    with pytest.raises(UserError, match="StructureDistillation"):
        compress(trained, loader, strategy="structure-distillation")


@pytest.fixture(scope="module")
def table(trained: nn.Module) -> LatencyTable:
    return timed_by_macs(trained, INPUTS)


def test_latency_and_macs_at_once(trained: nn.Module, loader: Any, table: LatencyTable) -> None:
    budgets = [diplugin.Budget("latency_ms", fraction=0.5), diplugin.Budget("macs", fraction=0.55)]
    lines: list[str] = []
    strategy = StructureDistillation(Geometric(2), FineTuning(epochs=1, lr=0.01))
    result = compress(trained, loader, budgets=budgets, latency_table=table, strategy=strategy, tell=lines.append)
    assert all(budget["met"] for budget in result.metrics["budgets"])
    first, last = (row["costs"]["latency_ms"] for row in result.metrics["steps"])
    assert last["predicted"] <= 0.5 * last["base"] < first["predicted"] <= 0.5**0.5 * first["base"]
    assert sum("latency_ms" in line for line in lines if line.startswith("step")) == 2


def test_a_resumed_run_keeps_plans_that_were_made_by_the_clock(
    trained: nn.Module, loader: Any, table: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock never says the same twice; what was planned by it stays planned."""
    clock = iter(range(1000))
    monkeypatch.setattr(Measure, "local", property(lambda _: True))
    monkeypatch.setattr(Measure, "milliseconds", lambda *_: 0.3 + 0.05 * next(clock))
    settings: dict[str, Any] = {"budgets": [diplugin.Budget("latency_ms", fraction=0.6)], "latency_table": table,
                                "strategy": StructureDistillation(Linear(2), lesson=None), "out": tmp_path}  # fmt: skip
    planned: list[str] = []

    def kill(line: str) -> None:
        planned.extend([line] if line.startswith("step 2 of 2: macs") else [])
        if line.startswith("step 2 of 2: holdout"):
            raise Killed

    with pytest.raises(Killed):
        compress(trained, loader, **settings, tell=kill)
    asked = next(clock)
    result = compress(trained, loader, **settings, resume=True, tell=planned.append)
    assert next(clock) == asked + 1, "the clock was not asked again"
    assert planned.count(planned[0]) == 2
    assert result.plan == PruningPlan.load(tmp_path / "plan.json")


def test_latency_budgets_need_a_table(trained: nn.Module, loader: Any) -> None:
    with pytest.raises(BudgetError, match="latency table"):
        compress(trained, loader, budgets=[diplugin.Budget("latency_ms", limit=1.0)], strategy=STEPS)
