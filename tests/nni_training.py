"""What an NNI evaluator is made of: a training step, a loop and a traced optimizer; and errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nni
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diplugin.errors import DipluginError

GOOD = [{"op_names": ["0"], "sparse_ratio": 0.5}]


def step(batch: Any, model: nn.Module) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def looping(loader: Any) -> Callable[..., None]:
    def train(model: Any, optimizer: Any, step: Any, _lr: Any, max_steps: int, _epochs: Any) -> None:
        for _, batch in zip(range(max_steps), loader, strict=False):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    return train


def traced(model: nn.Module) -> Any:
    return nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)


def assert_one_line(error: BaseException) -> None:
    assert isinstance(error, DipluginError)
    assert str(error).strip()
    assert "\n" not in str(error)
