"""Repairs are chosen by the judge, and one that hurts is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from diplugin.errors import UserError
from diplugin.network import trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import REPAIRS, Cut, Recalibrate, best_repair


@dataclass(frozen=True)
class Scramble:
    """A repair that hurts: random weights."""

    name: str = "scramble"

    def repaired(self, cut: Cut) -> nn.Module:
        model = cut.pruned()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_()
        return model


@pytest.fixture
def cut(make_net: Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]) -> Cut:
    """A plan that keeps every channel."""
    model, inputs = make_net("plain")
    trace = trace_network(model, inputs)
    everything = {g.name: tuple(range(g.channels)) for g in trace.prunable}
    plan = PruningPlan(everything, {n: len(k) for n, k in everything.items()}, {}, trace.inputs)
    return Cut(model, [(torch.randn(20, *inputs[0].shape[1:]), torch.zeros(20))], trace, plan)


def test_the_judge_chooses(make_net: Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
    model, inputs = make_net("residual")
    trace = trace_network(model, inputs)
    plan = PruningPlan(
        {g.name: tuple(range(g.channels - 1)) for g in trace.prunable},
        {g.name: g.channels for g in trace.prunable}, {}, trace.inputs,
    )  # fmt: skip
    x = torch.randn(100, *inputs[0].shape[1:])
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def nearness(net: nn.Module) -> float:
        with torch.no_grad():
            return -float((net.eval()(x) - model(x)).square().mean())

    repairs = (Scramble(), *REPAIRS, Scramble("scramble again"))
    best, verdicts = best_repair(Cut(model, [(x, torch.zeros(100))], trace, plan), repairs, nearness)
    assert set(verdicts) == {repair.name for repair in repairs}
    assert nearness(best) == max(verdicts.values()) > verdicts["scramble"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_repairs_of_one_name_are_told_apart(cut: Cut) -> None:
    worth, judged = iter((0.5, 0.9, 0.6)), []

    def judge(net: nn.Module) -> float:
        judged.append(net)
        return next(worth)

    best, verdicts = best_repair(cut, (Recalibrate("other"), Recalibrate("same"), Recalibrate("same")), judge)
    assert best is judged[1] and verdicts == {"other": 0.5, "same": 0.9, "same 2": 0.6}
    with pytest.raises(UserError, match="a repair to try at least"):
        best_repair(cut, (), judge)


def test_a_tie_goes_to_the_first(cut: Cut) -> None:
    marked: list[nn.Module] = []

    def judge(net: nn.Module) -> float:
        marked.append(net)
        return 0.0

    best, _ = best_repair(cut, (Recalibrate("one"), Recalibrate("two")), judge)
    assert best is marked[0]
