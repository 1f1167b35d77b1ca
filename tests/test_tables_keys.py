"""Sizes that follow from an operator's key."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_tables import conv
from torch import nn

from diplugin.tables import OpKey


@pytest.mark.parametrize(
    ("key", "size"),
    [
        (conv(4, 4, stride=(2, 2)), (4, 4)),
        (conv(4, 4, kernel=(5, 5), padding=(0, 0)), (4, 4)),
        (conv(4, 4, op="conv_transpose", stride=(2, 2), kernel=(2, 2), padding=(0, 0)), (16, 16)),
        (OpKey("linear", 4, 4), (1,)),
    ],
)
def test_output_size(key: OpKey, size: tuple[int, ...]) -> None:
    assert key.output_size == size


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        (conv(12, 8), nn.Conv2d(12, 8, 3, bias=False)),
        (conv(12, 12, groups=12), nn.Conv2d(12, 12, 3, groups=12, bias=False)),
        (conv(12, 8, groups=4), nn.Conv2d(12, 8, 3, groups=4, bias=False)),
        (conv(12, 8, op="conv_transpose", groups=2), nn.ConvTranspose2d(12, 8, 3, groups=2, bias=False)),
        (conv(12, 8, kernel=(1, 5)), nn.Conv2d(12, 8, (1, 5), bias=False)),
        (OpKey("linear", 12, 8, size=(7,)), nn.Linear(12, 8, bias=False)),
    ],
)
def test_weight_bytes_are_those_of_torchs_layer(key: OpKey, layer: nn.Module) -> None:
    floats = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert key.weight_bytes == floats and replace(key, dtype="int8").weight_bytes == floats // 4
