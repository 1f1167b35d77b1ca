"""Layers that do something else than their settings say, as libraries of models have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PadsItself(nn.Conv2d):
    """As TensorFlow pads: the output is ceil(input / stride), and an odd zero goes behind. Its `padding` is zero."""

    def forward(self, input: Tensor) -> Tensor:
        pads: list[int] = []
        for n, k, s, d in zip(input.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(input, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardises(nn.Conv2d):
    """Filters of zero mean and one variance, whatever its weight is."""

    def forward(self, input: Tensor) -> Tensor:
        mean, std = (f(self.weight, dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
        return self._conv_forward(input, (self.weight - mean) / (std + 1e-5), self.bias)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with an activation of its own, in place where told so."""

    inplace = False

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input), inplace=self.inplace)


class Activates(nn.Conv2d):
    """With an activation of its own, in place."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input), inplace=True)


class Casts(nn.Linear):
    """Its weight to the type of what it reads, often the one that it has."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class Squares(nn.Conv2d):
    """Of the squares of what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.square())


class Pools(nn.Conv2d):
    """Of a smaller map than it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.avg_pool2d(input, 4))


class Adapted(nn.Linear):
    """A low-rank product beside its own."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(inside, outside)
        self.down, self.up = nn.Parameter(torch.randn(2, inside)), nn.Parameter(torch.randn(outside, 2))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.down.T @ self.up.T


def padding_net() -> nn.Module:
    """Three convolutions that pad themselves, lopsidedly where the stride is 2; the last one's maps are 2x2."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            PadsItself(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            PadsItself(8, 8, 5, stride=2, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            PadsItself(8, 12, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        )  # fmt: skip
        for _ in range(20):
            model(torch.randn(32, 3, 8, 8) * 2 + 1)
    return model.eval()
