"""The example networks are the published ones, and diplugin leaves their zero-padded shortcuts alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diplugin.costs import macs, params
from diplugin.network import trace_network
from examples.cifar_resnet import resnet20, resnet56

X = (torch.zeros(1, 3, 32, 32),)


@pytest.mark.parametrize(
    ("make", "layers", "million_params", "million_macs"), [(resnet20, 20, 0.27, 40.6), (resnet56, 56, 0.85, 125.5)]
)
def test_size(make: object, layers: int, million_params: float, million_macs: float) -> None:
    model = make()  # type: ignore[operator]
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    trace = trace_network(model, X, verify=False)
    assert len(weighted) == layers
    assert params(trace).base == pytest.approx(million_params * 1e6, rel=0.02)
    assert macs(trace).base == pytest.approx(million_macs * 1e6, rel=0.02)


def test_only_channels_inside_blocks_are_offered() -> None:
    trace = trace_network(resnet20().eval(), X)
    assert {g.name for g in trace.prunable} == {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)}
    assert all(g.note for g in trace.groups if not g.prunable)
