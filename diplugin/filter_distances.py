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


def filter_distances(model: nn.Module, group: ChannelGroup) -> Tensor | None:
    """The sum of the distances of every root channel's filters to the other channels', float64 [channels].

    Filters are the weights that produce a channel, in every convolution and linear layer of the group but the
    depthwise ones; in a grouped convolution they are compared with those that read the same inputs. Distances of
    several layers add up. None where nothing of that kind produces the channels.
    """
    layers, total = dict(model.named_modules()), torch.zeros(group.channels, dtype=torch.float64)
    producers = group.side("out")
    for member in producers:
        distances = _distances(layers[member.layer])[list(member.channels)]
        total.index_add_(0, torch.tensor(member.roots), distances)
    return total if producers else None


def _distances(layer: Any) -> Tensor:
    """[output channels] of one layer."""
    blocks, weight = getattr(layer, "groups", 1), layer.weight.detach().cpu().double()
    by_block = weight.unflatten(0, (blocks, -1))  # [blocks, outputs, inputs, ...], a transposed one's the other way
    filters = (by_block.transpose(1, 2) if isinstance(layer, _TRANSPOSED) else by_block).flatten(2)
    return torch.cdist(filters, filters).sum(2).flatten()
