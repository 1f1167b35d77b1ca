"""Data and networks that features cannot be watched on: one line that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diplugin.errors import DataError, DISaturationWarning, ModelError
from diplugin.features import Observation, labels_of, score_points
from diplugin.taps import TapPoint

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]

POINT = TapPoint("0", "out")


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3))


X = torch.randn(12, 4)
Y = torch.arange(12) % 3


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        ([], "an empty one"),
        ([(X, torch.zeros(12).long())], "labels that differ"),
        ([(X[:1], Y[:1])], "labels that differ"),
        ([(X, Y - 1)], "start at 0"),
        ([(X, Y.float())], "class ids are integers"),
        ([(X, Y.float()[:, None].fill_(torch.nan))], "NaN"),
        ([(X, Y[:, None, None])], "shape"),
        ([(X, Y[:7])], "one length"),
        ([X], r"\(inputs, labels\)"),
        ([(X, Y, Y)], r"a tuple of 3"),
        ([{"x": X}], "got dict"),
        ([(X, None)], r"\(inputs, labels\)"),
        ([(X, Y.tolist())], r"\(inputs, labels\)"),
        ([(X, torch.tensor(3))], "shape"),
        ([(X.fill_(0) + torch.nan, Y)], "NaN"),
        ([(torch.full((12, 4), torch.inf), Y)], "NaN or infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_that_cannot_be_used(loader: Any, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        score_points(linear(), loader, [POINT])
    assert "\n" not in str(caught.value)


def test_nan_features_name_their_layer(make_net: MakeNet, make_images: Any) -> None:
    model, _ = make_net("plain")
    with torch.no_grad():
        model.get_submodule("3").weight[0] = torch.nan
    with pytest.raises(DataError, match=r"input of 7: .*NaN"):
        score_points(model, make_images(20).loader(20), [TapPoint("7", "in")])


def test_inputs_that_do_not_fit_the_model() -> None:
    with pytest.raises(ModelError, match="expected a model that runs on the batches, got RuntimeError"):
        score_points(linear(), [(torch.randn(12, 5), Y)], [POINT])


def test_labels_of_another_type() -> None:
    with pytest.raises(DataError, match="labels as a tensor, got list"):
        score_points(linear(), [(torch.randn(12, 4), Y)], [POINT], Observation(get_labels=lambda b: b[1].tolist()))


def test_an_unknown_layer() -> None:
    with pytest.raises(ModelError, match="'nope'"):
        score_points(linear(), [(torch.randn(12, 4), Y)], [TapPoint("nope", "in")])


def test_saturation_warns() -> None:
    images = torch.randn(60, 400) * 0.01
    images[:, :3] += 5 * F.one_hot(torch.arange(60) % 3)
    model = nn.Sequential(nn.Identity())
    with pytest.warns(DISaturationWarning, match="0"):
        score_points(model, [(images, torch.arange(60) % 3)], [POINT], Observation(rho=1e-4))


def test_labels_of_reads_pairs_only() -> None:
    assert labels_of([X, Y]) is Y
    with pytest.raises(DataError, match="get_labels="):
        labels_of((X, Y, Y))
