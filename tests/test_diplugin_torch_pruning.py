"""DIImportance in torch-pruning's own pruners, and what it says to input that it cannot use."""

from __future__ import annotations

import copy
import os
import stat
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from diplugin_torch_pruning import PLAIN, DIImportance
from torch import Tensor, nn

import diplugin
from diplugin.discriminant import channel_scores
from diplugin.errors import DataError, FrozenLayersWarning, ModelError, NotFittedError, PlanError, StaleScoresWarning
from diplugin.fitted_scores import MACs
from diplugin.taps import AtLayer, AtNorm, Largest, Mean, TapPoint

SIDE = 8


class Residual(nn.Module):
    """A stem, two residual blocks with 1x1 shortcuts, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.short = nn.Conv2d(8, 16, 1, stride=2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(self.short(x) + self.conv3(x))
        return self.fc(x.mean((2, 3)))


class PaddedShortcut(nn.Module):
    """CIFAR's option A: the shortcut takes every second pixel and pads channels with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.outer = nn.Conv2d(10, 16, 3, padding=1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.outer(F.relu(self.inner(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.fc(x.mean((2, 3)))


def data(images: int = 60, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    inputs = torch.randn(images, 3, SIDE, SIDE, generator=draw)
    return inputs + 0.5 * labels.view(-1, 1, 1, 1) * torch.randn(1, 3, SIDE, SIDE, generator=draw), labels


def make(kind: type[nn.Module] = Residual, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


X = torch.randn(1, 3, SIDE, SIDE)


def group_of(model: nn.Module, name: str, indices: list[int] | None = None):
    graph = tp.DependencyGraph().build_dependency(model, (X,))
    layer = dict(model.named_modules())[name]
    pruner = graph.get_pruner_of_module(layer)
    indices = list(range(graph.get_out_channels(layer))) if indices is None else indices
    return graph.get_pruning_group(layer, pruner.prune_out_channels, indices)


def pruner_of(model: nn.Module, importance: DIImportance, kind=tp.pruner.BasePruner, **options):
    options = {"ignored_layers": [model.fc], "pruning_ratio": 0.5, **options}
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    return kind(model, (X,), importance=importance, **fresh, **options)


def test_scores_are_those_of_the_tensor_that_the_next_layer_reads():
    model, (x, y) = make(), data()
    importance = DIImportance(**PLAIN).fit(model, [(x, y)])
    with torch.no_grad():
        model.eval()
        seen = F.relu(model.bn1(model.conv1(F.relu(model.bn(model.stem(x))))))
    torch.testing.assert_close(importance(group_of(model, "conv1")), channel_scores(seen, y).float())


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
    stack = torch.stack([points["conv1"], points["conv3"], points["short"]]).float()
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


def test_options_of_the_pruner_hold():
    model = make()
    importance = DIImportance().fit(model, [data()])
    pruner_of(model, importance, round_to=4, pruning_ratio_dict={model.conv1: 0.25},
              ignored_layers=[model.fc, model.conv3]).step()  # fmt: skip
    assert model.conv1.out_channels == 8  # 12 · 0.75 = 9, rounded down to a multiple of 4
    assert model.stem.out_channels == 4
    assert model.conv3.out_channels == 16


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


def test_save_and_load(tmp_path):
    model = make()
    importance = DIImportance(rho=3.0).fit(model, [data()])
    importance.save(tmp_path / "scores.safetensors")
    loaded = DIImportance.load(tmp_path / "scores.safetensors")
    for name in ("stem", "conv1"):
        group = group_of(copy.deepcopy(model), name)
        torch.testing.assert_close(loaded(group), importance(group))
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)
    with pytest.warns(StaleScoresWarning, match="weights have changed"):
        loaded(group_of(model, "conv1"))


def test_saving_into_a_pipe_leaves_it_one(tmp_path):
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    importance = DIImportance().fit(make(), [data()])
    importance.save(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(30)
    (tmp_path / "copy").write_bytes(got[0])
    assert DIImportance.load(tmp_path / "copy").fitted.layers == importance.fitted.layers


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    importance = DIImportance().fit(make(), [data()])
    for path in (tmp_path, tmp_path / "file" / "scores"):
        with pytest.raises(PlanError, match="can be written"):
            importance.save(path)


def test_loading_something_else(tmp_path):
    (tmp_path / "broken").write_bytes(b"not a file of scores")
    for path in (tmp_path / "broken", tmp_path / "none"):
        with pytest.raises(PlanError, match="expected scores saved by diplugin"):
            DIImportance.load(path)


def test_not_fitted():
    with pytest.raises(NotFittedError, match="call fit"):
        DIImportance()(group_of(make(), "stem"))


def test_fitted_on_another_model():
    importance = DIImportance().fit(make(PaddedShortcut), [data()])
    with pytest.raises(NotFittedError, match=r"had no 'conv1'|got 12"):
        importance(group_of(make(), "conv1"))
    wider = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    narrow = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    fitted = DIImportance().fit(wider, [data()])
    with pytest.raises(NotFittedError, match="expected 8 channels in of '2', got 6"):
        fitted(group_of(narrow, "0"))


def test_a_copy_of_the_fitted_model_is_the_same_model():
    model = make()
    importance = DIImportance().fit(model, [data()])
    of_copy = importance(group_of(copy.deepcopy(model), "conv1"))
    torch.testing.assert_close(of_copy, importance(group_of(model, "conv1")))


def test_channels_removed_behind_its_back():
    model = make()
    importance = DIImportance().fit(model, [data()])
    importance(group_of(model, "conv1"))
    group_of(model, "conv1", [0, 1]).prune()
    with pytest.raises(NotFittedError, match="call fit"):
        importance(group_of(model, "conv1"))


def test_group_that_never_ran():
    class Detour(Residual):
        def forward(self, x: Tensor, detour: bool = True) -> Tensor:
            x = F.relu(self.bn(self.stem(x)))
            if detour:
                x = F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return self.fc(F.relu(self.short(x) + self.conv3(x)).mean((2, 3)))

    model = make(Detour)
    importance = DIImportance(forward=lambda model, batch: model(batch[0], detour=False)).fit(model, [data()])
    with pytest.raises(NotFittedError, match="none of these did: conv1"):
        importance(group_of(model, "conv1"))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "empty"),
        (3, "expected a loader"),
        ([data()[0]], "batches of"),
        ([(data()[0], torch.zeros(60, 8, 8, dtype=torch.long))], r"\[60, 8, 8\]"),
        ([(data()[0], torch.zeros(60, dtype=torch.long))], "differ"),
        ([(data()[0], data()[1][:-1])], "length"),
        ([(data()[0] * torch.nan, data()[1])], "NaN"),
    ],
)
def test_bad_data_is_named(loader, message: str):
    with pytest.raises(DataError, match=message):
        DIImportance().fit(make(), loader)


def test_bad_models_are_named():
    with pytest.raises(ModelError, match=r"expected a torch\.nn\.Module"):
        DIImportance().fit(3, [data()])
    with pytest.raises(ModelError, match="convolution or linear"):
        DIImportance().fit(nn.ReLU(), [data()])
    with pytest.raises(ModelError, match="runs on the batches"):
        DIImportance().fit(nn.Sequential(nn.Conv2d(4, 4, 3)), [data()])


def test_modes_hooks_and_gradients_are_left_as_they_were():
    model = make()
    model.train()
    model.bn.eval()
    model.stem.weight.requires_grad_(False)
    DIImportance().fit(model, [data()])
    assert model.training and not model.bn.training and not model.stem.weight.requires_grad
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_generator_and_any_batch_size_give_the_same_scores():
    x, y = data()
    model = make()
    whole = DIImportance().fit(model, [(x, y)])
    parts = DIImportance().fit(model, ((x[i : i + 7], y[i : i + 7]) for i in range(0, 60, 7)))
    group = group_of(model, "stem")
    torch.testing.assert_close(whole(group), parts(group), rtol=1e-4, atol=1e-9)


def test_dict_batches_through_get_labels_and_forward():
    x, y = data()
    model = make()
    importance = DIImportance(get_labels=lambda b: b["target"], forward=lambda m, b: m(b["pixels"]))
    importance.fit(model, [{"pixels": x, "target": y}])
    want = DIImportance().fit(model, [(x, y)])
    torch.testing.assert_close(importance(group_of(model, "stem")), want(group_of(model, "stem")))


def test_channels_last_and_bfloat16():
    x, y = data()
    model = make()
    group = group_of(model, "conv1")
    want = DIImportance().fit(model, [(x, y)])(group)
    moved = copy.deepcopy(model).to(memory_format=torch.channels_last)
    got = DIImportance().fit(moved, [(x.to(memory_format=torch.channels_last), y)])(group_of(moved, "conv1"))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = DIImportance().fit(model, [(x, y)])(group)
    assert torch.corrcoef(torch.stack([mixed, want]))[0, 1] > 0.99
    half = DIImportance().fit(copy.deepcopy(model).bfloat16(), [(x.bfloat16(), y)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StaleScoresWarning)
        assert torch.corrcoef(torch.stack([half(group), want]))[0, 1] > 0.99


def test_a_frozen_backbone_is_scored_and_told_of():
    model, batch = make(), data()
    want = DIImportance().fit(model, [batch])(group_of(model, "conv1"))
    model.requires_grad_(False)
    with pytest.warns(FrozenLayersWarning, match="6 of 6 layers"):
        importance = DIImportance().fit(model, [batch])
    model.requires_grad_(True)
    torch.testing.assert_close(importance(group_of(model, "conv1")), want)
