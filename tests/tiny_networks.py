"""Tiny networks of every kind that pruning meets: a few hundred weights each, seeded, untrained.

Normalisation layers get random weights and running statistics, so that a channel that was removed by mistake, or kept
at the wrong position, shows in the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two blocks; the second halves the resolution and projects its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.a1, self.b1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.a2, self.b2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.c1, self.d1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.c2, self.d2 = nn.Conv2d(16, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.project = nn.Conv2d(8, 10, 1, stride=2, bias=False)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.b2(self.a2(F.relu(self.b1(self.a1(x))))))
        x = F.relu(self.project(x) + self.d2(self.c2(F.relu(self.d1(self.c1(x))))))
        return self.head(x.mean((2, 3)))


class OptionA(nn.Module):
    """The CIFAR shortcut without parameters: every second pixel, new channels padded with zeros on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.b(F.relu(self.a(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))
        x = F.relu(x + self.d(F.relu(self.c(x))))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual with squeeze and excitation, MobileNet's manner."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depth = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16))
        self.squeeze = nn.Sequential(nn.Conv2d(16, 6, 1), nn.ReLU(), nn.Conv2d(6, 16, 1), nn.Hardsigmoid())
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu6(self.depth(self.expand(x)))
        y = self.project(y * self.squeeze(y.mean((2, 3), keepdim=True)))
        return self.head((x + y).mean((2, 3)))


class Dense(nn.Module):
    """Concatenations, as in DenseNet: every layer reads all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.n1, self.c1 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)
        self.n2, self.c2 = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3, padding=1)
        self.n3 = nn.BatchNorm2d(15)
        self.head = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.c1(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c2(F.relu(self.n2(x)))], 1)
        return self.head(F.relu(self.n3(x)).mean((2, 3)))


class MultiOutput(nn.Module):
    """Two heads on one trunk, returned as a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.first, self.second = nn.Linear(12, 4), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.trunk(x)
        return {"logits": self.first(x.mean((2, 3))), "mask": self.second(x)}


class Tokens(nn.Module):
    """Tokens [N, T, C] with a position embedding and one residual MLP: channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 4, 12))
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Twice(nn.Module):
    """One convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.shared(F.relu(self.stem(x))))
        return self.head(F.relu(self.shared(x)).mean((2, 3)))


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12),
        nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 10, 1), nn.PReLU(10), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(10, 4),
    )  # fmt: skip


def _vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 14), nn.ReLU(), nn.Linear(14, 4),
    )  # fmt: skip


def _grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False),
        nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(12, 4),
    )  # fmt: skip


def _transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1),
        nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 9, 3), nn.ReLU(), nn.Conv2d(9, 2, 1),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "plain": _plain, "residual": Residual, "option_a": OptionA, "vgg": _vgg, "depthwise": Depthwise, "dense": Dense,
    "grouped": _grouped, "transposed": _transposed, "multi_output": MultiOutput, "tokens": Tokens, "twice": Twice,
}  # fmt: skip


KINDS = list(BUILDERS)


def tiny_network(kind: str) -> nn.Module:
    """A network of this kind in eval mode, the same at every call."""
    torch.manual_seed(sum(map(ord, kind)))
    model = BUILDERS[kind]()
    _shake(model)
    return model.eval()


def _shake(model: nn.Module) -> None:
    """Random affine weights and statistics for every normalisation layer."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
