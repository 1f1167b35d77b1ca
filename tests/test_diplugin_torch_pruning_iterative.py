"""DIImportance step by step: the scores of those that are left, fresh ones, floors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch_pruning as tp
from diplugin_torch_pruning import PLAIN, DIImportance
from small_residual import SIDE, X, data, group_of, make, pruner_of
from torch import nn

from diplugin.errors import NotFittedError, StaleScoresWarning
from diplugin.taps import AtLayer, AtNorm


def test_interactive_pruning():
    model = make()
    importance = DIImportance().fit(model, [data()])
    for group in pruner_of(model, importance).step(interactive=True):
        group.prune()
    assert (model.stem.out_channels, model.conv1.out_channels) == (4, 6)


def test_iterative_steps_rank_survivors_by_the_scores_of_the_fitted_network():
    model, (x, y) = make(), data()
    importance = DIImportance(**PLAIN).fit(model, [(x, y)])
    kept = importance(group_of(model, "conv1")).argsort()[6:].sort().values
    want = model.conv1.weight.detach()[kept]
    stem = model.stem
    pruner = pruner_of(model, importance, iterative_steps=3, ignored_layers=[model.fc, model.conv3, stem])
    with pytest.warns(StaleScoresWarning, match="channels have been removed"):
        for _ in range(3):
            pruner.step()
    torch.testing.assert_close(model.conv1.weight.detach(), want)


def test_iterative_pruning_follows_every_group():
    model = make()
    importance = DIImportance().fit(model, [data()])
    pruner = pruner_of(model, importance, iterative_steps=4, global_pruning=True)
    with pytest.warns(StaleScoresWarning):
        for _ in range(4):
            pruner.step()
    assert model(X).shape == (1, 3)


def test_refit_scores_the_network_as_it_is():
    model, batch = make(), data()
    importance = DIImportance(refit=True, floor=0.0).fit(model, [batch])  # a floor is of the channels at first
    pruner = pruner_of(model, importance, iterative_steps=2)
    pruner.step()
    fresh = DIImportance(floor=0.0).fit(model, [batch])
    torch.testing.assert_close(importance(group_of(model, "conv1")), fresh(group_of(model, "conv1")))
    pruner.step()
    assert model.conv1.out_channels == 6


def test_refit_scores_afresh_also_a_group_far_from_what_left_since_the_last_fit():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(6)]
    model = nn.Sequential(*(m for conv in convs for m in (conv, nn.ReLU())), nn.Flatten(), nn.Linear(8 * SIDE**2, 3))
    importance = DIImportance(refit=True).fit(model, [data()])
    graph = tp.DependencyGraph().build_dependency(model, (X,))
    for conv in (convs[0], convs[2]):
        importance(graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(8))))
        graph.get_pruning_group(conv, tp.prune_conv_out_channels, [0, 1, 2]).prune()
    group = graph.get_pruning_group(convs[4], tp.prune_conv_out_channels, list(range(8)))
    torch.testing.assert_close(importance(group), DIImportance().fit(model, [data()])(group))


def test_a_group_asked_for_in_another_order_is_followed_by_its_channels():
    model = make()
    importance = DIImportance(**PLAIN).fit(model, [data()])
    before = importance(group_of(model, "conv1"))
    order = list(reversed(range(12)))
    group = group_of(model, "conv1", order)
    torch.testing.assert_close(importance(group), before[order])
    group._DG.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [1, 4]).prune()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleScoresWarning)
        left = group._DG.get_pruning_group(model.conv1, tp.prune_conv_out_channels, list(range(10)))
        torch.testing.assert_close(importance(left), before[[c for c in range(12) if c not in (1, 4)]])


@pytest.mark.parametrize("refit", [False, True])
def test_a_floor_is_of_the_channels_at_first(refit: bool):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 40, 3), nn.ReLU(), nn.Flatten(),
                          nn.Linear(40 * (SIDE - 4) ** 2, 3))  # fmt: skip
    importance = DIImportance(floor=0.5, refit=refit).fit(model, [data()])
    pruner = tp.pruner.BasePruner(model, (X,), importance, global_pruning=True, pruning_ratio=0.48, iterative_steps=6,
                                  ignored_layers=[model[5]])  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleScoresWarning)
        for _ in range(6):
            pruner.step()
    assert min(model[0].out_channels, model[2].out_channels) >= 20
    assert model[0].out_channels + model[2].out_channels < 50


@pytest.mark.parametrize("tap", [AtLayer(), AtNorm()])
def test_energies_follow_the_survivors_whatever_is_tapped(tap: Any):
    model = make()
    importance = DIImportance(tap=tap).fit(model, [data()])
    before = importance.explain(group_of(model, "conv1")).energies
    group = group_of(model, "conv1", [1, 4])
    importance(group)
    group.prune()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleScoresWarning)
        full = group._DG.get_pruning_group(model.conv1, tp.prune_conv_out_channels, list(range(10)))
        after = importance.explain(full).energies
    torch.testing.assert_close(after, before[[c for c in range(len(before)) if c not in (1, 4)]])


def test_channels_removed_behind_its_back():
    model = make()
    importance = DIImportance().fit(model, [data()])
    importance(group_of(model, "conv1"))
    group_of(model, "conv1", [0, 1]).prune()
    with pytest.raises(NotFittedError, match="call fit"):
        importance(group_of(model, "conv1"))
