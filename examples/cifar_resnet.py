"""ResNet-20 and ResNet-56 for CIFAR-10 (He et al. 2016, section 4.2) with parameter-free shortcuts.

The shortcut between stages takes every second pixel and pads the missing channels with zeros ("option A"), so the
residual stream cannot be pruned by a dependency graph: diplugin sees that and prunes inside the blocks alone.

    diplugin compress examples.cifar_resnet:resnet20 cifar10:DIR --weights cifar10_resnet20.safetensors \\
        --example-shape 1,3,32,32 --budget macs=0.5 --out runs/resnet20
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.pad = stride, (planes - in_planes) // 2

    def shortcut(self, x: Tensor) -> Tensor:
        """Every `stride`-th pixel, zero channels on both sides."""
        if self.stride == 1 and self.pad == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """6n + 2 layers: a 3x3 stem, three stages of n blocks at 16, 32 and 64 channels, pooling, one linear layer."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet20() -> CifarResNet:
    """0.27 M parameters, 40.6 M MACs at 32 x 32."""
    return CifarResNet(3)


def resnet56() -> CifarResNet:
    """0.85 M parameters, 125.5 M MACs at 32 x 32."""
    return CifarResNet(9)
