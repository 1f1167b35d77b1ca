"""The least-squares problem of one layer, against LAPACK."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diplugin.layer_calls import set_call
from diplugin.network import trace_network
from diplugin.recovery.layer_fit import LayerFit, Site


def conv_of(depthwise: bool) -> tuple[nn.Conv2d, Site, Tensor, Tensor]:
    torch.manual_seed(1)
    channels = 4
    conv = nn.Conv2d(channels, channels if depthwise else 5, 3, 2, 1, groups=channels if depthwise else 1)
    x = torch.randn(30, channels, 9, 9)
    target = torch.randn(30, conv.out_channels, 5, 5)
    net = nn.Sequential(conv)
    spec = trace_network(net, (x[:1],), verify=False).layers[0]
    positions = torch.arange(25).repeat(30, 1)  # every position: the problem is then exactly LAPACK's
    return conv, Site(spec, 0, torch.arange(conv.out_channels), None, positions), x, target


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_fit_is_the_least_squares_solution(depthwise: bool) -> None:
    conv, site, x, target = conv_of(depthwise)
    LayerFit(conv, site, set_call(conv, x), site.sampled(target)).solve(1e-12, None)
    columns = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    flat = target.flatten(2).transpose(1, 2).flatten(0, 1)
    ones = torch.ones(len(columns), 1)
    for out in range(conv.out_channels):
        mine = columns[:, 9 * out : 9 * out + 9] if depthwise else columns
        solution = torch.linalg.lstsq(torch.cat([mine, ones], 1).double(), flat[:, out : out + 1].double()).solution
        assert torch.allclose(conv.weight[out].flatten().double(), solution[:-1, 0], atol=1e-4)
        assert conv.bias is not None and torch.allclose(conv.bias[out].double(), solution[-1, 0], atol=1e-4)


def test_a_large_ridge_holds_the_present_weights() -> None:
    conv, site, x, target = conv_of(False)
    before = conv.weight.detach().clone()
    LayerFit(conv, site, set_call(conv, x), site.sampled(target)).solve(1e9, None)
    assert torch.allclose(conv.weight, before, atol=1e-6)
