"""Train or eval: set for a while, and given back to every module as it was.

`model.train(was_training)` sets all modules alike; a network whose frozen BatchNorms are in eval mode while the rest
trains would come back changed. Here every module gets its own mode back, whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """After the block every module is in the mode in which it was before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of the block.

    >>> net = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    >>> _ = net[1].eval()
    >>> with evaluating(net):
    ...     [module.training for module in net]
    [False, False]
    >>> [module.training for module in net]
    [True, False]
    """
    with modes_kept(model):
        model.eval()
        yield
