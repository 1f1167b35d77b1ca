"""What DI takes: labels in every form, features and settings; and how the unusable is named."""

from __future__ import annotations

import math

import pytest
import torch
from labelled_maps import maps
from torch import Tensor

from diplugin.discriminant import (
    backward_elimination,
    channel_scores,
    chunk_scores,
    discriminant_information,
    label_targets,
    perturbation_scores,
)
from diplugin.errors import DataError, DISaturationWarning, UserError


def test_label_forms_agree() -> None:
    features, ids = maps(30, 5)
    expected = channel_scores(features, ids)
    one_hot = torch.nn.functional.one_hot(ids, 4)
    wide = torch.cat([one_hot.double(), torch.zeros(30, 100)], 1)  # more columns than images, most of them empty
    rotation = torch.linalg.qr(torch.randn(60, 4, dtype=torch.float64))[0]
    logits = one_hot.double() @ rotation.T  # the same targets, seen from another basis of 60 dimensions
    for form in (ids * 10, ids.int(), one_hot, one_hot.bool(), one_hot.float(), wide, logits, logits * 1e20):
        torch.testing.assert_close(channel_scores(features, form), expected, rtol=1e-8, atol=1e-13)
    multi = (torch.arange(30)[:, None] % torch.tensor([2, 3, 5]) == 0).long()
    assert 0 < float(discriminant_information(features, multi)) < 1


def test_balanced_targets_weigh_every_class_the_same() -> None:
    ids = torch.tensor([0] * 90 + [1] * 9 + [2] * 1)
    balanced = label_targets(ids, class_weight="balanced")
    assert float(balanced.square().sum()) == pytest.approx(2.0)  # L − 1
    torch.testing.assert_close(balanced.mean(0), torch.zeros(3, dtype=torch.float64))
    assert label_targets(ids, num_classes=7, class_weight="balanced").shape == (100, 7)
    assert label_targets(ids, class_weight="balanced").dtype == torch.float64


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.zeros(4, 2, 2), {}, "got shape"),
        (torch.zeros(8).long(), {}, "all 8 labels are the same"),
        (torch.ones(8, 3), {}, "all 8 labels are the same"),
        (torch.zeros(8, 0), {}, "the same"),
        (torch.zeros(0).long(), {}, "two images or more, got 0"),
        (torch.zeros(1).long(), {}, "two images or more, got 1"),
        (torch.tensor([0, 1, 7]), {"num_classes": 5}, "num_classes=5, got 7"),
        (torch.tensor([0, 1, -100]), {}, "got -100"),
        (torch.tensor([0.5, 1.0]), {}, "class ids are integers"),
        (torch.tensor([[0.5], [math.nan]]), {}, "NaN or infinity"),
        (torch.tensor([[0.5], [0.2]]), {"class_weight": "balanced"}, "0/1 targets"),
    ],
)
def test_unusable_labels_are_named(labels: Tensor, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        label_targets(labels, **options)
    assert "\n" not in str(error.value)


def test_unusable_features_and_settings_are_named() -> None:
    features, labels = maps(8, 3, 5, 5)
    broken = features.clone()
    broken[2, 1] = math.nan
    cases = [
        (broken, labels, "NaN or infinity"),
        (features.float() * math.inf, labels, "NaN or infinity"),
        (features[:7], labels, "7 feature maps and 8 labels"),
        (features[:, 0, 0, 0], labels, r"maps \[N, C, ...\]"),
        (features.long(), labels, "int64"),
        (features[:, :0], labels, "a channel"),
    ]
    for maps_, ids, message in cases:
        with pytest.raises(DataError, match=message):
            channel_scores(maps_, ids)
        with pytest.raises(DataError, match=message):
            chunk_scores(maps_, label_targets(ids))
    for options in ({"rho": 0.0}, {"rho": -1.0}, {"ridge": 0.0}, {"rho": math.nan}, {"class_weight": "even"}):
        with pytest.raises(UserError):
            channel_scores(features, labels, **options)
    with pytest.raises(DataError, match="pooled"):
        backward_elimination(features, labels)
    with pytest.raises(DataError, match="errors have"):
        perturbation_scores(features, features[:, :2], labels)
    with pytest.raises(DataError, match="too small"):
        channel_scores(torch.ones(8, 30) * torch.arange(8.0)[:, None], labels, rho=1e-30)


def test_saturation_warns() -> None:
    features, labels = maps(10, 5, 8, 8)
    with pytest.warns(DISaturationWarning, match="larger rho"):
        channel_scores(features, labels, rho=1e-6)
