"""What NNI's masks should be: configurations, shares that are masked, and cut networks equal to masked ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diplugin_nni import speedup
from torch import Tensor, nn


def config(model: nn.Module, ratio: float = 0.5, **more: Any) -> list[dict[str, Any]]:
    """Every convolution and linear layer but the classifier."""
    head = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    return [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": [head], "sparse_ratio": ratio, **more}]


def sparsity(masks: Any) -> dict[str, float]:
    """Masked share of every weight mask."""
    return {name: 1 - float(m["weight"].float().mean()) for name, m in masks.items() if m.get("weight") is not None}


def assert_exactly(model: nn.Module, masks: Any, ratio: float) -> None:
    """Every masked convolution and linear layer has lost just the asked share of its rows, rounded down."""
    layers = {name: m for name, m in model.named_modules() if name in masks and isinstance(m, (nn.Conv2d, nn.Linear))}
    assert layers
    for name in layers:
        rows = masks[name]["weight"].flatten(1)
        assert int((~rows.bool().any(1)).sum()) == int(len(rows) * ratio), name
        assert set(rows.mean(1).tolist()) <= {0.0, 1.0}


def run(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x)


def assert_cut_equals_masked(model: nn.Module, masks: Any, x: Tensor) -> nn.Module:
    want = run(model, x)
    before = sum(p.numel() for p in copy.deepcopy(model).parameters())
    small = speedup(model, masks, x[:1])
    assert torch.allclose(run(small, x), want, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < before
    return small
