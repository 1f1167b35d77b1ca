"""What an NNI evaluator is made of: a training step, a loop and a traced optimizer; and errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice, repeat
from typing import Any

import nni
import torch
import torch.nn.functional as F
from nni.compression import TorchEvaluator
from torch import Tensor, nn

from diplugin.errors import DipluginError

GOOD = [{"op_names": ["0"], "sparse_ratio": 0.5}]


def step(batch: Any, model: nn.Module, *_: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def looping(loader: Any, epochs: int = 1000) -> Callable[..., None]:
    """A loop over the loader: so many steps or epochs as it is asked for, and no more epochs than these."""

    def train(
        model: nn.Module, optimizer: Any, step: Any, _lr: Any = None, max_steps: Any = None, max_epochs: Any = None
    ) -> None:
        model.train()
        for batch in islice(chain.from_iterable(repeat(loader, max_epochs or epochs)), max_steps):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    return train


def traced(model: nn.Module) -> Any:
    return nni.trace(torch.optim.SGD)(model.parameters(), lr=0.01)


def trained_by(model: nn.Module, loader: list[Any], make: Any = TorchEvaluator) -> TorchEvaluator:
    """An evaluator as NNI's users write it."""
    return make(looping(loader), traced(model), step)


def assert_one_line(error: BaseException) -> None:
    assert isinstance(error, DipluginError)
    assert str(error).strip()
    assert "\n" not in str(error)
