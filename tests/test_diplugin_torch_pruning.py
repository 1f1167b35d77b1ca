"""DIImportance in torch-pruning's own pruners: whose scores they are, and in which order channels leave."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from diplugin_torch_pruning import PLAIN, DIImportance
from small_residual import PaddedShortcut, X, data, group_of, make, pruner_of
from torch import nn

import diplugin
from diplugin.discriminant import channel_scores
from diplugin.errors import StaleScoresWarning
from diplugin.fitted_scores import MACs
from diplugin.taps import AtLayer, Largest, Mean, TapPoint


def test_scores_are_those_of_the_tensor_that_the_next_layer_reads():
    model, (x, y) = make(), data()
    importance = DIImportance(**PLAIN).fit(model, [(x, y)])
    with torch.no_grad():
        model.eval()
        seen = F.relu(model.bn1(model.conv1(F.relu(model.bn(model.stem(x))))))
    torch.testing.assert_close(importance(group_of(model, "conv1")).float(), channel_scores(seen, y).float())


def test_a_ranking_hears_how_large_the_filters_are_when_it_is_asked():
    heard = []

    def by_norm(losses, energies, norms):
        heard.append(norms)
        return norms

    model, (x, y) = make(), data()
    importance = DIImportance(**{**PLAIN, "ranking": by_norm}).fit(model, [(x, y)])
    for grown in (1.0, 5.0):
        model.conv1.weight.data[2] *= grown
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", StaleScoresWarning)
            scores = importance(group_of(model, "conv1"))
        norms = torch.tensor([float((kernel.double() ** 2).sum()) for kernel in model.conv1.weight.detach()])
        torch.testing.assert_close(heard[-1].float(), norms)
        assert torch.equal(scores.argsort(), norms.argsort())


def test_partial_groups_are_scored_like_the_channels_they_hold():
    model = make()
    importance = DIImportance().fit(model, [data()])
    full = importance(group_of(model, "stem"))
    assert len(full) == 8
    torch.testing.assert_close(importance(group_of(model, "stem", [6, 1, 4])), full[[6, 1, 4]])


def test_residual_group_puts_its_readers_together_as_the_tap_says():
    model = make()
    group, scores = group_of(model, "stem"), {}
    for combine in (Mean(), Largest(), None):
        tap = diplugin.taps.AfterActivation(combine) if combine else None
        importance = DIImportance(tap=tap, **PLAIN).fit(model, [data()])
        scores[type(combine).__name__] = importance(group)
    points = {p.layer: s.scores for p, s in importance.fitted.points.items() if p.side == "in"}
    stack = torch.stack([points["conv1"], points["conv3"], points["short"]]).double()
    torch.testing.assert_close(scores["Mean"], stack.mean(0))
    torch.testing.assert_close(scores["Largest"], stack.amax(0))
    torch.testing.assert_close(scores["NoneType"], stack.sum(0))


@pytest.mark.parametrize("global_pruning", [False, True])
@pytest.mark.parametrize("isomorphic", [False, True])
def test_base_pruner_local_global_isomorphic(global_pruning: bool, isomorphic: bool):
    model = make()
    importance = DIImportance().fit(model, [data()])
    before = sum(p.numel() for p in model.parameters())
    pruner_of(model, importance, global_pruning=global_pruning, isomorphic=isomorphic).step()
    assert sum(p.numel() for p in model.parameters()) < before
    assert model(X).shape == (1, 3)


def test_local_pruning_keeps_the_best_half():
    model = make()
    importance = DIImportance().fit(model, [data()])
    scores = importance(group_of(model, "conv1"))
    kept = scores.argsort()[6:].sort().values
    want = model.conv1.weight.detach()[kept]
    pruner_of(model, importance, ignored_layers=[model.stem, model.conv3, model.fc]).step()
    torch.testing.assert_close(model.conv1.weight.detach(), want)


@pytest.mark.parametrize(
    "kind",
    [tp.pruner.MetaPruner, tp.pruner.MagnitudePruner, tp.pruner.GroupNormPruner, tp.pruner.BNScalePruner,
     tp.pruner.GrowingRegPruner],
)  # fmt: skip
def test_every_pruner_takes_it_also_while_training(kind):
    model, (x, y) = make(), data()
    importance = DIImportance().fit(model, [(x, y)])
    pruner = pruner_of(model, importance, kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    F.cross_entropy(model(x), y).backward()
    pruner.regularize(model, 1) if type(pruner) is tp.pruner.BasePruner else pruner.regularize(model)
    if hasattr(pruner, "update_reg"):
        pruner.update_reg()
    optimizer.step()
    with pytest.warns(StaleScoresWarning, match="weights have changed"):
        pruner.step()
    assert model.conv1.out_channels == 6
    assert model(x).shape == (60, 3)


def test_what_the_floor_spares_keeps_its_order():
    """A cut beyond the floor, by a ratio of 95 % say, takes the least of it."""
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512 * 36, 3)), data()
    group = group_of(model, "0")
    spared, plain = (DIImportance(floor=floor).fit(model, [batch])(group) for floor in (0.5, 0.0))
    assert torch.equal(spared.argsort(stable=True), plain.argsort(stable=True))


def test_options_of_the_pruner_hold():
    model = make()
    importance = DIImportance().fit(model, [data()])
    pruner_of(model, importance, round_to=4, pruning_ratio_dict={model.conv1: 0.25},
              ignored_layers=[model.fc, model.conv3]).step()  # fmt: skip
    assert model.conv1.out_channels == 8  # 12 · 0.75 = 9, rounded down to a multiple of 4
    assert model.stem.out_channels == 4
    assert model.conv3.out_channels == 16


def test_per_cost_divides_by_the_macs_that_a_channel_frees():
    model = make()
    batch = data()
    plain = DIImportance(**PLAIN).fit(model, [batch])
    per = DIImportance(**{**PLAIN, "per_cost": MACs()}).fit(model, [batch])
    freed = (8 * 9 * 64 + 8 * 9 * 64) / per.fitted.macs
    group = group_of(model, "conv1")
    torch.testing.assert_close(per(group), plain(group) / freed)
    counted = tp.utils.count_ops_and_params(copy.deepcopy(model), (X,))[0]
    assert per.fitted.macs == pytest.approx(counted, rel=0.1)  # theirs also counts normalisation and activations


def test_zero_padded_shortcut_is_left_alone_and_the_network_stays_whole():
    model, (x, y) = make(PaddedShortcut), data()
    importance = DIImportance().fit(model, [(x, y)])
    assert importance(group_of(model, "stem")) is None
    assert "zero-padded" in str(importance.explain(group_of(model, "stem")))
    pruner_of(model, importance).step()
    assert (model.stem.out_channels, model.inner.out_channels, model.outer.out_channels) == (8, 5, 16)
    assert model(x).shape == (60, 3)


def test_explanation_names_the_tensors():
    model = make()
    importance = DIImportance(tap=AtLayer()).fit(model, [data()])
    told = importance.explain(group_of(model, "stem"))
    assert {point for point, _, _ in told.tensors} == {TapPoint("stem", "out"), TapPoint("conv2", "out")}
    assert "output of conv2: DI 0." in str(told)


def test_channels_go_in_the_order_of_what_the_explanation_holds():
    model = make()
    told = DIImportance().fit(model, [data()]).explain(group_of(model, "conv1"))
    channels = range(model.conv1.out_channels)
    both = [float(told.losses[c].double() * told.energies[c].double()) for c in channels]
    norms = [sum(float(w) ** 2 for w in model.conv1.weight[c].detach().flatten()) for c in channels]
    torch.testing.assert_close(told.norms.float(), torch.tensor(norms))
    places = [sorted(channels, key=both.__getitem__).index(c) + sorted(channels, key=norms.__getitem__).index(c)
              for c in channels]  # fmt: skip
    assert told.scores.argsort(stable=True).tolist() == sorted(channels, key=places.__getitem__)
