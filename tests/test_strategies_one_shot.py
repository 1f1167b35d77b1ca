"""One shot: what it reads of the data, what it scores, and what its search is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diplugin.costs import Budget, macs
from diplugin.network import trace_network
from diplugin.ranking import ByLoss
from diplugin.recovery import Recalibrate
from diplugin.scoring import score_groups
from diplugin.strategies import OneShot

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def test_scores_are_those_of_the_first_images_and_energies_come_along(make_net: MakeNet, make_images: Any) -> None:
    model, inputs = make_net("residual")
    trace, data = trace_network(model, inputs), make_images(300)
    scores = OneShot(images=200).score(model, data.loader(64), trace)
    alone = score_groups(model, [(data.images[:200], data.labels[:200])], trace.groups)
    assert scores.images == 200
    for name, expected in alone.scores.items():
        torch.testing.assert_close(scores.scores[name], expected, rtol=1e-5, atol=1e-9)
        assert len(scores.energies[name]) == len(expected)


def test_the_ranking_decides_who_leaves_and_not_how_many(make_net: MakeNet, make_images: Any) -> None:
    model, inputs = make_net("plain")
    trace, data = trace_network(model, inputs), make_images(120)
    costs, budgets = [macs(trace)], [Budget("macs", fraction=0.5)]
    plans = []

    def worst_first(losses: Tensor, energies: Tensor | None, norms: Tensor | None = None) -> Tensor:
        return -losses

    for ranking in (ByLoss(), worst_first):
        once = OneShot(ranking=ranking)
        scores = once.score(model, data.loader(40), trace)
        losses = once.losses(trace, scores)
        for name, given in losses.items():
            torch.testing.assert_close(given.sort().values, scores.scores[name].sort().values)
            order = ranking(scores.scores[name], None)
            along = given[order.argsort(stable=True)]
            assert torch.equal(along, along.sort().values)
        plans.append(once.search(trace, scores, costs, budgets))
    one, two = plans
    assert one.widths == two.widths
    assert one.kept != two.kept
    assert one.costs["macs"].fraction <= 0.5


def test_carving_leaves_the_network_alone(
    make_net: MakeNet, make_images: Any, state_of: Any, assert_same_state: Any
) -> None:
    model, inputs = make_net("plain")
    trace, data = trace_network(model, inputs), make_images(80)
    once, before = OneShot(repairs=(Recalibrate(),)), state_of(model)
    plan = once.search(trace, once.score(model, data.loader(40), trace), [macs(trace)], [Budget("macs", fraction=0.6)])
    pruned, verdicts = once.carve(
        model, data.loader(40), trace, plan, lambda net: float(net(data.images).detach().std())
    )
    assert_same_state(model, before)
    assert macs(trace_network(pruned, inputs)).base == pytest.approx(plan.costs["macs"].predicted)
    assert list(verdicts) == ["recalibration"]
