"""Easy data for tests that train, learnt in seconds: a bright bar at one of four places, in noise; and a net for it."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diplugin.recovery import FineTuning, train

CLASSES = 4
INPUTS = (torch.zeros(1, 1, 8, 8),)


def bars(images: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (images,), generator=draw)
    x = 0.5 * torch.randn(images, 1, 8, 8, generator=draw)
    for i, label in enumerate(labels.tolist()):
        x[i, 0, 2 * label : 2 * label + 2] += 1.0
    return TensorDataset(x, labels)


class BarsNet(nn.Module):
    """A block with a shortcut, and two hidden layers; penultimate features can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.bn2 = nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c, self.d, self.head = nn.Conv2d(8, 12, 3, stride=2), nn.Linear(12 * 9, 12), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x)).relu()
        x = (x + self.bn2(self.b(self.bn1(self.a(x)).relu()))).relu()
        return self.head(self.d(self.c(x).relu().flatten(1)).relu())


def make_bars_net() -> nn.Module:
    torch.manual_seed(0)
    return BarsNet()


def trained_on_bars() -> nn.Module:
    return train(make_bars_net(), DataLoader(bars(400, 1), 50, shuffle=True), FineTuning(epochs=3, lr=0.05)).eval()
