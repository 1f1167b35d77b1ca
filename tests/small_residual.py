"""Small networks with shortcuts for torch-pruning's pruners, data of three classes, and their groups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_pruning as tp
from diplugin_torch_pruning import DIImportance
from torch import Tensor, nn

SIDE = 8
X = torch.randn(1, 3, SIDE, SIDE)


class Residual(nn.Module):
    """A stem, two residual blocks with 1x1 shortcuts, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.short = nn.Conv2d(8, 16, 1, stride=2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(self.short(x) + self.conv3(x))
        return self.fc(x.mean((2, 3)))


class PaddedShortcut(nn.Module):
    """CIFAR's option A: the shortcut takes every second pixel and pads channels with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.outer = nn.Conv2d(10, 16, 3, padding=1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.outer(F.relu(self.inner(x)))
        x = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        return self.fc(x.mean((2, 3)))


def data(images: int = 60, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    inputs = torch.randn(images, 3, SIDE, SIDE, generator=draw)
    return inputs + 0.5 * labels.view(-1, 1, 1, 1) * torch.randn(1, 3, SIDE, SIDE, generator=draw), labels


def make(kind: type[nn.Module] = Residual, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def group_of(model: nn.Module, name: str, indices: list[int] | None = None):
    graph = tp.DependencyGraph().build_dependency(model, (X,))
    layer = dict(model.named_modules())[name]
    pruner = graph.get_pruner_of_module(layer)
    indices = list(range(graph.get_out_channels(layer))) if indices is None else indices
    return graph.get_pruning_group(layer, pruner.prune_out_channels, indices)


def pruner_of(model: nn.Module, importance: DIImportance, kind=tp.pruner.BasePruner, **options):
    options = {"ignored_layers": [model.fc], "pruning_ratio": 0.5, **options}
    fresh = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}, "channel_groups": {}}
    return kind(model, (X,), importance=importance, **fresh, **options)
