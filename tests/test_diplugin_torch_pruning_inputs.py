"""What DIImportance can be fitted on, and what it says to models and data that it cannot use."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from diplugin_torch_pruning import PLAIN, DIImportance
from small_residual import PaddedShortcut, Residual, data, group_of, make
from torch import Tensor, nn

from diplugin.discriminant import channel_scores
from diplugin.errors import DataError, FrozenLayersWarning, ModelError, NotFittedError, StaleScoresWarning


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


def test_groups_that_start_from_an_embedding():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden, self.head = nn.Embedding(20, 16), nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.hidden(self.embed(x))).mean(1))

    torch.manual_seed(0)
    model, y = Words(), torch.arange(60) % 3
    x = (torch.randint(0, 20, (60, 7)) + y[:, None]) % 20
    importance = DIImportance(**PLAIN).fit(model, [(x, y)])
    with torch.no_grad():
        want = channel_scores(model.embed(x).transpose(1, 2), y).argsort()[8:].sort().values
        kept = model.embed.weight[:, want].clone()
    tp.pruner.BasePruner(model, (x[:1],), importance, pruning_ratio=0.5, ignored_layers=[model.head],
                         root_module_types=[nn.Embedding, nn.Linear], num_heads={}).step()  # fmt: skip
    torch.testing.assert_close(model.embed.weight.detach(), kept)
