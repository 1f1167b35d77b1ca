"""Orders compared over many networks: what is compared, and on which images."""

from __future__ import annotations

import numpy as np
import orders
import pytest
import torch
from protocol import Data


def test_only_networks_that_have_both_count() -> None:
    rows = [{"contender": name, "seed": seed, "target": target, "top1": top1} for name, seed, target, top1 in (
        (orders.YARDSTICK, 0, 0.3, 70.0), ("DI", 0, 0.3, 71.0), ("DI", 1, 0.3, 90.0), (orders.YARDSTICK, 2, 0.3, 60.0),
        ("DI", 2, 0.3, 59.5), ("FPGM", 2, 0.3, 61.0), (orders.YARDSTICK, 1, 0.5, 10.0), ("DI", 0, 0.5, 99.0),
    )]  # fmt: skip
    assert orders.against(rows, 0.3) == {"DI": [1.0, -0.5], "FPGM": [1.0]}
    assert orders.against(rows, 0.5) == {}


def test_what_is_learned_is_never_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "LEARNED", 6)
    x = torch.randint(256, (14, 3, 4, 4), dtype=torch.uint8)
    y = torch.arange(14)
    small = orders.halved(Data((x[:8], y[:8]), (x[8:11], y[8:11]), (x[11:], y[11:])))
    assert small.train[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert small.held[1].tolist() == [6, 7, 8, 9, 10]
    assert small.test[1].tolist() == [11, 12, 13]
    shrunk = np.concatenate([part[0].numpy() for part in (small.train, small.held, small.test)])
    blocks = x.numpy().reshape(14, 3, 2, 2, 2, 2).astype(float).mean((3, 5))
    assert np.abs(shrunk - blocks).max() <= 0.5
