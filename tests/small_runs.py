"""Whole runs small enough for tests: a chain of convolutions that knows bars, and `compress` of it to half its MACs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from bars import CLASSES, INPUTS, bars
from torch import nn
from torch.utils.data import DataLoader

import diplugin
from diplugin.recovery import FineTuning, train

HALF = diplugin.Budget("macs", fraction=0.5)


class Killed(BaseException):
    """Stands for a signal: no handler of the pipeline's may swallow it."""


def make_net() -> nn.Module:
    """Untrained, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, CLASSES),
    )  # fmt: skip


@cache
def trained_net() -> nn.Module:
    """Trained on `seen`, in eval mode, shared: `compress` leaves it as it is."""
    loader = DataLoader(bars(400, 1), batch_size=50, shuffle=True)
    return train(make_net(), loader, FineTuning(epochs=3, lr=0.05)).eval()


def seen() -> DataLoader[Any]:
    """What the network was trained on."""
    return DataLoader(bars(400, 1), batch_size=50)


def unseen() -> DataLoader[Any]:
    """What it was not."""
    return DataLoader(bars(200, 2), batch_size=100)


def compress(model: nn.Module, loader: Any, **settings: Any) -> diplugin.CompressionResult:
    """To half the MACs, if the settings say nothing else."""
    return diplugin.compress(model, loader, **{"example_inputs": INPUTS, "budgets": [HALF], **settings})
