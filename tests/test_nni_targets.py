"""Scores in NNI's granularities: against NNI's own scaler applied to scores spread over the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from diplugin_nni import DIPruner
from diplugin_nni_targets import metric_of, side_of, targets_with

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]


def space_of(
    make_net: MakeNet, make_images: Callable[..., Any], layer: str, granularity: Any, kind: str = "vgg"
) -> Any:
    model, _ = make_net(kind)
    settings = {"weight": {"sparse_ratio": 0.5, "granularity": granularity}}
    entry = {"op_names": [layer], "target_names": ["weight"], "target_settings": settings}
    pruner = DIPruner(model, [entry], calibration_data=make_images(20).loader(20))
    return pruner._target_spaces[layer]["weight"]


@pytest.mark.parametrize(
    ("granularity", "side", "shape"),
    [
        ("default", "out", (6, 1, 1, 1)), ("out_channel", "out", (6, 1, 1, 1)), ("in_channel", "in", (1, 8, 1, 1)),
        ([3, -1, -1, -1], "out", (2, 1, 1, 1)), ([-1, 4, -1, -1], "in", (1, 2, 1, 1)),
        ([1, 1, -1, -1], "out", (6, 8, 1, 1)), ([1, 1, 1, 1], "out", (6, 8, 3, 3)),
        ([2, 4, -1, -1], "out", (3, 2, 1, 1)),
    ],
)  # fmt: skip
def test_metrics_have_nnis_shape_and_lose_no_score(
    make_net: MakeNet, make_images: Callable[..., Any], granularity: Any, side: str, shape: tuple[int, ...]
) -> None:
    space = space_of(make_net, make_images, "3", granularity)
    assert side_of("3", "weight", space) == ("3", side)
    scores = torch.rand(6 if side == "out" else 8, dtype=torch.float64)
    metric = metric_of(scores, space, "weight")
    assert metric.shape == space._scaler.shrink(space.target, keepdim=True).shape == shape
    assert float(metric.sum()) == pytest.approx(float(scores.sum()))


def test_whole_channels_keep_their_scores_to_the_last_bit(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    space = space_of(make_net, make_images, "3", "default")
    scores = torch.rand(6, dtype=torch.float64)
    assert torch.equal(metric_of(scores, space, "weight").flatten(), scores)


def test_finer_blocks_share_a_channels_score_by_energy(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    space = space_of(make_net, make_images, "3", [1, 1, -1, -1])
    with torch.no_grad():
        space.target[2] = 0
    scores = torch.rand(6, dtype=torch.float64)
    metric = metric_of(scores, space, "weight")
    energy = space.target.double().square().sum((2, 3))
    want = scores[:, None] * energy / energy.sum(1, keepdim=True)
    want[2] = scores[2] / 8
    assert torch.allclose(metric[:, :, 0, 0], want)


def test_columns_of_a_grouped_convolution_gather_their_blocks(
    make_net: MakeNet, make_images: Callable[..., Any]
) -> None:
    space = space_of(make_net, make_images, "2", "in_channel", kind="grouped")
    scores = torch.rand(8, dtype=torch.float64)
    assert torch.allclose(metric_of(scores, space, "weight").flatten(), scores.view(4, 2).sum(0))


def test_transposed_convolutions_hold_outputs_second(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    space = space_of(make_net, make_images, "2", "default", kind="transposed")
    assert side_of("2", "weight", space) == ("2", "out")
    assert metric_of(torch.rand(6, dtype=torch.float64), space, "weight").shape == (1, 6, 1, 1)


def test_a_bias_that_is_not_there_is_no_target(make_net: MakeNet, make_images: Callable[..., Any]) -> None:
    model, _ = make_net("residual")
    entry = {"op_names": ["stem"], "sparse_ratio": 0.5}
    pruner = DIPruner(model, [entry], calibration_data=make_images(20).loader(20))
    assert [t for _, t, _ in targets_with(pruner._target_spaces, "sparse_ratio")] == ["weight"]
    assert {(m, t) for m, t, _ in targets_with(pruner._target_spaces, "align")} == {("bn0", "bias"), ("b2", "bias")}
