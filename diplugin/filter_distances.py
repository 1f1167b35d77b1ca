"""How far a channel's filters lie from those of the other channels: one in their midst says little that is its own.

An order of channels from weights alone, which knows of redundancy where DI's first-order losses do not.

Source: He, Liu, Wang, Hu & Yang, "Filter pruning via geometric median for deep convolutional neural networks
acceleration", 2019.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .groups import ChannelGroup

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def filter_distances(model: nn.Module, group: ChannelGroup) -> Tensor:
    """The sum of the distances of every root channel's filters to the other channels', float64 [channels].

    Filters are the weights that produce a channel, in every convolution and linear layer of the group; distances of
    several layers add up. Zeros where nothing produces them.
    """
    layers, total = dict(model.named_modules()), torch.zeros(group.channels, dtype=torch.float64)
    for member in group.side("out"):
        layer: Any = layers[member.layer]
        weight = layer.weight.detach().cpu().double()
        filters = _by_channel(weight, layer)[list(member.channels)]
        total.index_add_(0, torch.tensor(member.roots), torch.cdist(filters, filters).sum(1))
    return total


def _by_channel(weight: Tensor, layer: nn.Module) -> Tensor:
    """[output channels, weights of one]."""
    if not isinstance(layer, _TRANSPOSED):
        return weight.flatten(1)
    blocks: Any = layer.groups
    each = weight.unflatten(0, (blocks, -1)).transpose(1, 2)
    return each.flatten(0, 1).flatten(1)
