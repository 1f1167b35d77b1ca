"""Masks that follow other masks, as NNI's `align` asks: of weights and activations, in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nni")

from diplugin_nni import DIPruner
from nni_masks import assert_cut_equals_masked
from nni_training import assert_one_line

from diplugin.errors import UserError

MakeNet = Callable[..., tuple[nn.Module, tuple[Tensor, ...]]]
MakeImages = Callable[..., Any]


def along(module: str | None, target: str = "weight", **more: Any) -> dict[str, Any]:
    return {"align": {"module_name": module, "target_name": target, "dims": [0]}, **more}


def kept(mask: Tensor) -> list[bool]:
    return mask.flatten(1).any(1).tolist()


def test_activations_follow_a_weight(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    data = make_images(100)
    settings = {"_input_": along("0", granularity="per_channel")}
    entries = [{"op_names": ["0"], "sparse_ratio": 0.5},
               {"op_names": ["3"], "target_names": ["_input_"], "target_settings": settings}]  # fmt: skip
    _, masks = DIPruner(model, entries, calibration_data=data.loader(50)).compress()
    assert masks["3"]["_input_0"].shape == (1, 8, 1, 1)
    assert masks["3"]["_input_0"].flatten().bool().tolist() == kept(masks["0"]["weight"])
    assert_cut_equals_masked(model, masks, data.images[:5])


@pytest.mark.parametrize("order", [1, -1])
def test_a_chain_of_alignments_is_followed_from_its_start(
    make_net: MakeNet, make_images: MakeImages, order: int
) -> None:
    model, _ = make_net("residual")
    entries = [
        {"op_names": ["stem"], "sparse_ratio": 0.5},
        {"op_names": ["bn0"], "target_settings": {"weight": along("stem")}},
        {"op_names": ["b2"], "target_settings": {"weight": along("bn0", "bias")}},
    ][::order]
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    rows = kept(masks["stem"]["weight"])
    assert sum(rows) == 4
    for layer in ("bn0", "b2"):
        assert masks[layer]["weight"].bool().tolist() == masks[layer]["bias"].bool().tolist() == rows


def test_columns_follow_rows(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("vgg")
    settings = {"weight": along("0", granularity="in_channel")}
    entries = [{"op_names": ["0"], "sparse_ratio": 0.5},
               {"op_names": ["3"], "target_names": ["weight"], "target_settings": settings}]  # fmt: skip
    _, masks = DIPruner(model, entries, calibration_data=make_images(100).loader(50)).compress()
    assert kept(masks["3"]["weight"].transpose(0, 1)) == kept(masks["0"]["weight"])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_bias_of_a_transposed_convolution_follows_its_weight(make_images: MakeImages, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 16, 2, stride=2, groups=groups),
                          nn.ReLU(), nn.Conv2d(16, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()  # fmt: skip
    data = make_images(100)
    entries = [{"op_names": ["2"], "sparse_ratio": 0.5}]
    _, masks = DIPruner(model, entries, calibration_data=data.loader(50)).compress()
    assert int(masks["2"]["bias"].sum()) == 8
    silent = nn.Sequential(*model[:3])(data.images[:5]).abs().amax((0, 2, 3)) == 0
    assert torch.equal(silent, masks["2"]["bias"] == 0)


def test_a_mask_of_an_earlier_compressor_can_be_followed(make_net: MakeNet, make_images: MakeImages) -> None:
    model, _ = make_net("residual")
    loader = make_images(100).loader(50)
    entry = {"op_names": ["stem"], "sparse_ratio": 0.5}
    first = DIPruner(model, [entry], calibration_data=loader, align_followers=False)
    first.compress()
    entries = [{"op_names": ["c1"], "sparse_ratio": 0.5},
               {"op_names": ["bn0", "b2"], "target_settings": {"weight": along("stem")}}]  # fmt: skip
    _, masks = DIPruner.from_compressor(first, entries, calibration_data=loader).compress()
    assert masks["b2"]["bias"].bool().tolist() == kept(masks["stem"]["weight"])


@pytest.mark.parametrize(
    ("layer", "source", "words"),
    [("1", "0", "'1.weight' and .* as many channels"), ("1", "3", "align with a masked target"),
     ("1", "1", "wait for each other")],
)  # fmt: skip
def test_what_cannot_be_followed(make_images: MakeImages, layer: str, source: str, words: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
    target = "bias" if layer == source else "weight"
    entries = [{"op_names": ["0"], "sparse_ratio": 0.5},
               {"op_names": [layer], "target_settings": {"weight": along(source, target)}}]  # fmt: skip
    with pytest.raises(UserError, match=words) as caught:
        DIPruner(model, entries, calibration_data=make_images(40).loader(40)).compress()
    assert_one_line(caught.value)
