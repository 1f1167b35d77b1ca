"""How much of what a layer writes comes from each channel that it reads.

A reader's output is a sum of contributions, one a channel: y = Σ_c W_c * x_c. The *energy* of channel c is the variance
of its contribution over images and positions, summed over the reader's outputs, each weighed by the scale that a
BatchNorm behind the reader gives it: the squared error made there by replacing the channel by its mean. It needs no
labels, and no more than the k×k autocorrelation of every channel's map with the reader's own weights (our addition).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Elements of unfolded maps held at once, and positions that are enough for a variance.
_BLOCK, _POSITIONS = 1 << 23, 1 << 16


class EnergyMeter:
    """What the hooks note down in one forward pass; `energies` puts it together."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._moments: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._written: dict[str, weakref.ref[Tensor]] = {}

    def energies(self) -> dict[str, Tensor]:
        """Energy [channels read], float64, of every layer that ran; several calls add up."""
        return {name: energy(self._layers[name], m, self._scales.get(name)) for name, m in self._moments.items()}

    def read(self, name: str, x: Any, y: Any) -> None:
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point():
            self._written[name] = weakref.ref(y)
            moments = patch_moments(self._layers[name], x)
            self._moments[name] = self._moments[name] + moments if name in self._moments else moments

    def normalised(self, norm: Any, x: Any) -> None:
        for name, written in self._written.items():
            if written() is x and norm.running_var is not None:
                gain = norm.weight if norm.weight is not None else 1.0
                self._scales[name] = (gain * (norm.running_var + norm.eps).rsqrt()).detach().double()


@contextmanager
def measuring(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[EnergyMeter]:
    """Notes in the meter what these layers read while the block runs the model."""
    meter = EnergyMeter(layers)

    def reader(name: str) -> Any:
        return lambda _layer, args, output: meter.read(name, args[0] if args else None, output)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [layer.register_forward_hook(reader(name)) for name, layer in layers.items()]
    for norm in norms:
        handles.append(norm.register_forward_pre_hook(lambda m, args: meter.normalised(m, args[0] if args else None)))
    try:
        yield meter
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def patch_moments(layer: nn.Module, x: Tensor) -> Tensor:
    """Covariance of the k positions of a window, for every channel: [C, k, k], float64.

    For transposed and three-dimensional convolutions the windows' overlap is left out: [C, 1, 1], the variance.
    """
    module: Any = layer
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2).double().var(0, unbiased=False).view(-1, 1, 1)
    kernel, dims = tuple(module.kernel_size), x.ndim - 2
    if module.transposed or dims == 3 or prod(kernel) == 1:
        return x.double().movedim(1, 0).flatten(1).var(1, unbiased=False).view(-1, 1, 1)
    return _unfolded_covariance(module, x if dims == 2 else x.unsqueeze(2))


def _unfolded_covariance(conv: Any, x: Tensor) -> Tensor:
    def pair(value: Any, of_a_single_row: int = 1) -> Any:
        return tuple(value) if len(value) == 2 else (of_a_single_row, *value)

    kernel, stride, dilation = pair(conv.kernel_size), pair(conv.stride), pair(conv.dilation)
    padding = pair(conv.padding, 0) if not isinstance(conv.padding, str) else (0, 0)
    if conv.padding == "same":
        padding = (dilation[0] * (kernel[0] - 1) // 2, dilation[1] * (kernel[1] - 1) // 2)
    channels, window = x.shape[1], prod(kernel)
    pixels = max(1, x.shape[2] * x.shape[3] // prod(stride))
    images = min(len(x), max(8, _POSITIONS // pixels))
    second = torch.zeros(channels, window, window, dtype=torch.float64, device=x.device)
    first = torch.zeros(channels, window, dtype=torch.float64, device=x.device)
    count = 0
    for block in x[:images].split(max(1, _BLOCK // (channels * window * pixels))):
        columns = F.unfold(block.float(), kernel, dilation, padding, stride)
        columns = columns.view(len(block), channels, window, -1).permute(1, 2, 0, 3).flatten(2)
        second += (columns @ columns.transpose(1, 2)).double()
        first += columns.sum(2).double()
        count += columns.shape[2]
    mean = first / max(1, count)
    return second / max(1, count) - mean[:, :, None] * mean[:, None, :]


@torch.no_grad()
def energy(layer: nn.Module, moments: Tensor, scale: Tensor | None = None) -> Tensor:
    """Energy [C] of every channel read, from the covariance of its windows [C, k, k] and the outputs' scale [O]."""
    module: Any = layer
    weight, groups = module.weight.detach().double(), getattr(module, "groups", 1)
    if getattr(module, "transposed", False):  # [C, O/groups, ...]
        weight = torch.cat([w.transpose(0, 1) for w in weight.chunk(groups)])
    weight = weight.flatten(2) if weight.ndim > 2 else weight.unsqueeze(2)  # [O, C/groups, k]
    if scale is not None and len(scale) == len(weight):
        weight = weight * scale.to(weight.device).view(-1, 1, 1)
    blocks = weight.view(groups, -1, *weight.shape[1:])
    if moments.shape[1] == 1:
        return blocks.square().sum((1, 3)).flatten() * moments.flatten().to(blocks.device)
    gains = torch.einsum("goci,gocj->gcij", blocks, blocks).flatten(0, 1)
    return (gains * moments.to(gains.device)).sum((1, 2)).clamp(min=0)
