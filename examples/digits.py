"""What the NNI examples share: scikit-learn's digits, a small residual network, and plain training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

EXAMPLE = torch.zeros(1, 1, 24, 24)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network for small images: 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def loaders(batch_size: int = 64) -> tuple[DataLoader, DataLoader, DataLoader]:
    """Digits at 24 x 24: training data, shuffled by a seed; a holdout to choose by; test data to judge by."""
    images, labels = load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, scale_factor=3)
    y = torch.tensor(labels)
    fold = torch.arange(len(y)) % 5
    train_data, holdout, test = (TensorDataset(x[part], y[part]) for part in (fold > 1, fold == 1, fold == 0))
    order = torch.Generator().manual_seed(0)
    return (DataLoader(train_data, batch_size, shuffle=True, generator=order), DataLoader(holdout, 256),
            DataLoader(test, 256))  # fmt: skip


def train(model: nn.Module, loader: Iterable, epochs: int, lr: float = 0.05) -> None:
    """Stochastic gradient descent with a falling learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, loader: Iterable) -> float:
    """Share of right answers."""
    model.eval()
    right = [(model(images).argmax(1) == labels) for images, labels in loader]
    return float(torch.cat(right).float().mean())


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def trained_net(loader: Iterable, epochs: int = 6) -> DigitNet:
    """A network trained from a fixed seed."""
    torch.manual_seed(0)
    model = DigitNet()
    train(model, loader, epochs)
    return model
