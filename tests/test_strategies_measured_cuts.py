"""Measured cuts: budgets met, losses that an independent cut loses too, and the same plan after a kill."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bars import CLASSES, INPUTS, bars
from torch import Tensor, nn
from torch.utils.data import DataLoader

import diplugin
from diplugin.costs import Budget, macs, params
from diplugin.disguise import Disguised
from diplugin.errors import DataError, InfeasibleBudget, PlanError, UserError
from diplugin.features import forward_inputs, labels_of
from diplugin.filters import filter_distances
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import FineTuning, Recalibrate, Reconstruct, Reconstruction, reconstruct, train
from diplugin.search import SearchLimits, widest
from diplugin.strategies import CutLoss, MeasuredCuts, OneShot
from diplugin.strategies.cut_loss import Remembered
from diplugin.strategies.measured_cuts import Descent
from diplugin.surgery import apply_plan

pytestmark = pytest.mark.usefixtures("nothing_is_exported")
HALF = Budget("macs", fraction=0.5)


class Net(nn.Module):
    """A block with a shortcut, then a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.bn2 = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.head = nn.Conv2d(8, 12, 3, stride=2), nn.Linear(12 * 9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = (x + self.bn2(self.b(self.bn1(self.a(x)).relu()))).relu()
        return self.head(self.c(x).relu().flatten(1))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return train(Net(), DataLoader(bars(400, 1), 50, shuffle=True), FineTuning(epochs=3, lr=0.05)).eval()


@pytest.fixture(scope="module")
def loader() -> DataLoader[Any]:
    return DataLoader(bars(300, 1), batch_size=50)


@pytest.fixture(scope="module")
def loss_of(trained: nn.Module) -> CutLoss:
    fitted, judged = DataLoader(bars(120, 1), 40), DataLoader(bars(100, 2), 30)
    return CutLoss(trained, trace_network(trained, INPUTS), fitted, judged, labels_of, forward_inputs)


def descent_of(loss_of: CutLoss, rounds: int = 2) -> Descent:
    once = OneShot()
    scores = once.score(loss_of.model, loss_of.images, loss_of.trace)
    costs = [macs(loss_of.trace), params(loss_of.trace)]
    return MeasuredCuts(rounds).descent(once, loss_of.model, loss_of.trace, scores, costs, loss_of)


def test_the_loss_is_what_a_cut_and_refitted_network_loses_on_disguised_images(loss_of: CutLoss) -> None:
    plan = descent_of(loss_of).once.search(loss_of.trace, OneShot().score(loss_of.model, loss_of.images, loss_of.trace),
                                           [macs(loss_of.trace)], [HALF])  # fmt: skip
    small = apply_plan(copy.deepcopy(loss_of.model), plan)
    reconstruct(small, loss_of.model, loss_of.images, loss_of.trace, plan, Reconstruction())
    for judge, seen in ((loss_of, Disguised(loss_of.judged)), (replace(loss_of, disguise=False), loss_of.judged)):
        with torch.no_grad():
            losses = torch.cat([F.cross_entropy(small.eval()(x), y, reduction="none") for x, y in seen])
        assert len(losses) == 100
        assert judge(plan) == pytest.approx(float(losses.mean()), rel=1e-4)
    nothing = (torch.zeros(0, *INPUTS[0].shape[1:]), torch.zeros(0).long())
    assert replace(loss_of, judged=[*loss_of.judged, nothing])(plan) == loss_of(plan), "a batch without images"


def test_data_that_vary_at_random_vary_alike_in_every_trial(loss_of: CutLoss) -> None:
    class Varying:
        def __iter__(self) -> Any:
            return iter([(x + torch.randn(x.shape), y) for x, y in loss_of.judged])

    judge, plan = (
        replace(loss_of, judged=Varying()),
        descent_of(loss_of).once.plan(loss_of.trace, descent_of(loss_of).orders[0], [macs(loss_of.trace)], [HALF]),
    )
    assert judge(plan) == judge(plan)


def test_the_refit_is_that_of_one_shot(loss_of: CutLoss) -> None:
    own = Reconstruct(Reconstruction(images=50))
    for repairs, expected in (((Recalibrate(), own), own), ((Recalibrate(),), Recalibrate())):
        once = OneShot(repairs=repairs)
        made = MeasuredCuts().cut_loss(once, loss_of.model, loss_of.trace, loss_of.images, loss_of.judged)
        assert made.refit == expected


def test_losses_are_remembered_in_a_file(tmp_path: Path) -> None:
    asked: list[tuple[int, ...]] = []

    def loss(plan: PruningPlan) -> float:
        asked.append(plan.kept["a"])
        return math.nan if len(plan.kept["a"]) == 1 else len(plan.kept["a"]) / 3

    one, two = (PruningPlan({"a": kept}, {"a": 4}) for kept in ((0, 2), (3,)))
    path = tmp_path / "trials.json"
    assert [Remembered(loss, path)(plan) for plan in (one, two, one, two)] == [2 / 3, math.inf, 2 / 3, math.inf]
    assert asked == [(0, 2), (3,)]
    path.write_text('{"a": "low"}')
    with pytest.raises(PlanError, match="expected losses of trial cuts"):
        Remembered(loss, path)


def test_the_plan_loses_no_more_than_that_by_di_alone_and_costs_what_the_cut_network_does(loss_of: CutLoss) -> None:
    descent = descent_of(loss_of)
    plan, alone = descent.plan([HALF]), descent.once.plan(loss_of.trace, descent.orders[0], descent.costs, [HALF])
    assert loss_of(plan) <= loss_of(alone)
    small = trace_network(apply_plan(copy.deepcopy(loss_of.model), plan), INPUTS)
    assert plan.costs["macs"].predicted == macs(small).base <= 0.5 * macs(loss_of.trace).base
    assert plan.costs["params"].predicted == params(small).base
    for group in loss_of.trace.prunable:
        kept = set(plan.kept[group.name])
        orders = [losses[group.name].argsort(descending=True).tolist() for losses in descent.orders]
        assert any(kept == set(order[: len(kept)]) for order in orders), "the first ones of one of the orders"
    assert plan.kept != alone.kept, "or there is nothing to see below"
    worth = descent.orders[0]
    lost = sum(float(worth[n].sort().values[: len(worth[n]) - len(k)].sum()) for n, k in plan.kept.items())
    assert plan.path[:-1] == alone.path
    assert plan.path[-1].loss == pytest.approx(lost, rel=1e-5)


def test_channels_may_leave_by_ranking_by_loss_or_by_distance(loss_of: CutLoss) -> None:
    descent = descent_of(loss_of)
    scores = OneShot().score(loss_of.model, loss_of.images, loss_of.trace)
    for group in loss_of.trace.prunable:
        ranked, by_loss, by_distance = (losses[group.name] for losses in descent.orders)
        assert torch.equal(by_loss, scores.scores[group.name])
        for losses in (ranked, by_distance):
            assert torch.equal(losses.sort().values, by_loss.sort().values), "one unit, other channels"
        distances = filter_distances(dict(loss_of.model.named_modules()), group)
        assert distances is not None
        assert by_distance.argsort().tolist() == distances.argsort().tolist()


def test_asked_for_less_it_keeps_the_proportions_and_measures_nothing(loss_of: CutLoss) -> None:
    """As the search by the clock asks, when a structure turns out slower than predicted."""
    descent = descent_of(loss_of, rounds=1)
    first = descent.plan([HALF])
    descent.loss_of = lambda _: pytest.fail("measured again")
    budgets = [Budget("macs", fraction=0.4)]
    less = descent.plan(budgets)
    assert less.widths == widest(loss_of.trace, descent.costs, budgets, SearchLimits(), first.widths)
    assert less.costs["macs"].fraction <= 0.4
    assert less.path[:-1] == first.path[:-1] and less.found_by == first.found_by


def test_a_whole_run_meets_its_budgets_and_ends_like_one_that_was_killed(
    trained: nn.Module, loader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"example_inputs": INPUTS, "budgets": [HALF, Budget("params", fraction=0.6)],
                                "strategy": diplugin.MeasuredCuts(rounds=1), "holdout": 0.2}  # fmt: skip
    lines: list[str] = []
    whole = diplugin.compress(trained, loader, out=tmp_path / "whole", tell=lines.append, **settings)
    assert all(budget["met"] for budget in whole.metrics["budgets"])
    assert sum(line.startswith("structures measured, round 1 of 1") for line in lines) == 1

    class KilledError(Exception):
        pass

    def kill(line: str) -> None:
        if line.startswith("structures measured"):
            raise KilledError

    with pytest.raises(KilledError):
        diplugin.compress(trained, loader, out=tmp_path / "cut", tell=kill, **settings)
    monkeypatch.setattr(CutLoss, "__call__", lambda *_: pytest.fail("measured again"))
    resumed = diplugin.compress(trained, loader, out=tmp_path / "cut", resume=True, **settings)
    assert resumed.plan == whole.plan == PruningPlan.load(tmp_path / "cut" / "plan.json")
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.state_dict().values(),
                                                 whole.model.state_dict().values(), strict=True))  # fmt: skip


def test_numbers_out_of_range_and_budgets_out_of_reach(loss_of: CutLoss) -> None:
    for rounds in (0, "4"):
        with pytest.raises(UserError, match="rounds of 1 or more"):
            MeasuredCuts(rounds)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images to judge cuts by, got none"):
        replace(loss_of, judged=[])(descent_of(loss_of).plan([Budget("macs", fraction=1.0)]))
    with pytest.raises(InfeasibleBudget, match="no structure within reach"):
        descent_of(loss_of).plan([Budget("macs", fraction=0.001)])
