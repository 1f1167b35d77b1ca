"""What the filters that produce a channel say of it, without data: how large they are, and how far from the others.

Size is the field's oldest criterion and does well once a network is trained again; a filter in the midst of the others
says little that is its own, and so knows of redundancy where DI's first-order losses do not.

Sources: Li, Kadav, Durdanovic, Samet & Graf, "Pruning filters for efficient ConvNets", 2017 (norms); He, Liu, Wang, Hu
& Yang, "Filter pruning via geometric median for deep convolutional neural networks acceleration", 2019 (distances).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .groups import ChannelGroup

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def filter_distances(layers: Mapping[str, nn.Module], group: ChannelGroup) -> Tensor | None:
    """The sum of the distances of every root channel's filters to the other channels', float64 [channels].

    Filters are the weights that produce a channel, in every convolution and linear layer of the group but the
    depthwise ones; in a grouped convolution they are compared with those that read the same inputs. Distances of
    several layers add up. None where nothing of that kind produces the channels.

    Args:
        layers: by qualified name, as of `dict(model.named_modules())`.
    """
    return _summed(layers, group, lambda filters: torch.cdist(filters, filters).sum(2))


def filter_norms(layers: Mapping[str, nn.Module], group: ChannelGroup) -> Tensor | None:
    """The squared Euclidean norm of every root channel's filters, float64 [channels]; else as `filter_distances`."""
    return _summed(layers, group, lambda filters: filters.square().sum(2))


def _summed(layers: Mapping[str, nn.Module], group: ChannelGroup, read: Callable[[Tensor], Tensor]) -> Tensor | None:
    total, producers = torch.zeros(group.channels, dtype=torch.float64), group.side("out")
    for member in producers:
        found = read(_filters(layers[member.layer])).flatten()
        total.index_add_(0, torch.tensor(member.roots), found[list(member.channels)])
    return total if producers else None


def _filters(layer: Any) -> Tensor:
    """[blocks, outputs, weights of each] of one layer; blocks are a grouped convolution's."""
    blocks, weight = getattr(layer, "groups", 1), layer.weight.detach().cpu().double()
    by_block = weight.unflatten(0, (blocks, -1))  # [blocks, outputs, inputs, ...], a transposed one's the other way
    return (by_block.transpose(1, 2) if isinstance(layer, _TRANSPOSED) else by_block).flatten(2)
