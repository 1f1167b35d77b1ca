"""Orders compared over many networks: what is compared, and on which images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import orders
import pytest
import torch
from fine_tune import Setting
from protocol import Data

SETTING = Setting("resnet20, 16 px", (0.5, 0.3), orders.RECOVERY, judge="holdout")


def test_only_networks_that_have_both_count_and_only_rows_of_this_setting() -> None:
    taught = replace(SETTING, recipe=replace(SETTING.recipe, teacher_weight=0.7))
    rows = [{**key, "contender": who, "seed": seed, "target": share, "top1": top1} for key, who, seed, share, top1 in (
        (SETTING.key, "L2", 0, 0.3, 70.0), (SETTING.key, "DI", 0, 0.3, 71.0), (SETTING.key, "DI", 1, 0.3, 90.0),
        (SETTING.key, "L2", 2, 0.3, 60.0), (SETTING.key, "DI", 2, 0.3, 59.5), (SETTING.key, "FPGM", 2, 0.3, 61.0),
        (SETTING.key, "L2", 1, 0.5, 10.0), (SETTING.key, "DI", 0, 0.5, 99.0), (taught.key, "L2", 1, 0.3, 88.0),
    )]  # fmt: skip
    assert orders.ahead_of("L2", rows, SETTING, 0.3) == {"DI": [1.0, -0.5], "FPGM": [1.0]}
    assert orders.ahead_of("DI", rows, SETTING, 0.3) == {"L2": [-1.0, 0.5], "FPGM": [1.5]}
    assert orders.ahead_of("L2", rows, SETTING, 0.5) == orders.ahead_of("L2", rows, taught, 0.3) == {}


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
