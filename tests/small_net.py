"""A small net for images of digits, and a module of a user's own that holds it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip


def own_module(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A copy of this file under that name, found from the working folder; returns what the net is called by there."""
    shutil.copyfile(__file__, folder / f"{name}.py")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return f"{name}:small_net"
