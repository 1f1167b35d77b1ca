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

from .layer_calls import LayerCall, set_call, watching_calls

#: Elements of unfolded maps held at once, and positions that are enough for a variance.
_BLOCK, _POSITIONS = 1 << 23, 1 << 16


class EnergyMeter:
    """What is noted down in one forward pass; `energies` puts it together."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._weights: dict[str, Tensor] = {}
        self._moments: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self._written: dict[str, weakref.ref[Tensor]] = {}

    def energies(self) -> dict[str, Tensor]:
        """Energy [channels read], float64, of every layer that ran; several calls add up."""
        return {name: energy(self._weights[name], m, self._scales.get(name)) for name, m in self._moments.items()}

    def read(self, name: str, x: Any, y: Any, call: LayerCall | None) -> None:
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()):
            return
        call = call or set_call(self._layers[name], x)
        self._written[name] = weakref.ref(y)
        self._weights[name] = call.by_group
        moments = patch_moments(call)
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
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(lambda m, args: meter.normalised(m, args[0] if args else None))
               for norm in norms]  # fmt: skip
    try:
        with watching_calls(layers, meter.read):
            yield meter
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def patch_moments(call: LayerCall) -> Tensor:
    """Covariance of the k positions of a window, for every channel: [C, k, k], float64.

    For transposed and three-dimensional convolutions the windows' overlap is left out: [C, 1, 1], the variance.
    """
    if not call.kernel:
        return call.x.flatten(0, -2).double().var(0, unbiased=False).view(-1, 1, 1)
    if call.transposed or len(call.kernel) == 3 or prod(call.kernel) == 1:
        return call.x.double().movedim(1, 0).flatten(1).var(1, unbiased=False).view(-1, 1, 1)
    return _unfolded_covariance(call)


def _unfolded_covariance(call: LayerCall) -> Tensor:
    """Of a convolution in one or two dimensions."""

    def pair(value: tuple[int, ...]) -> tuple[int, ...]:
        return value if len(value) == 2 else (1, *value)

    kernel, stride, dilation = pair(call.kernel), pair(call.stride), pair(call.dilation)
    channels, window = call.x.shape[1], prod(kernel)
    pixels = max(1, prod(call.x.shape[2:]) // prod(stride))
    images = min(len(call.x), max(8, _POSITIONS // pixels))
    second = torch.zeros(channels, window, window, dtype=torch.float64, device=call.x.device)
    first = torch.zeros(channels, window, dtype=torch.float64, device=call.x.device)
    count = 0
    for block in call.x[:images].split(max(1, _BLOCK // (channels * window * pixels))):
        padded = call.padded(block.float())
        columns = F.unfold(padded if padded.ndim == 4 else padded.unsqueeze(2), kernel, dilation, 0, stride)
        columns = columns.view(len(block), channels, window, -1).permute(1, 2, 0, 3).flatten(2)
        second += (columns @ columns.transpose(1, 2)).double()
        first += columns.sum(2).double()
        count += columns.shape[2]
    mean = first / max(1, count)
    return second / max(1, count) - mean[:, :, None] * mean[:, None, :]


@torch.no_grad()
def energy(weight: Tensor, moments: Tensor, scale: Tensor | None = None) -> Tensor:
    """Energy [C] of every channel read.

    Args:
        weight: [G, O/G, C/G, k], a reader's by its groups.
        moments: covariance of its windows, [C, k, k], or [C, 1, 1] for the variance of its channels.
        scale: [O] of its outputs.
    """
    weight = weight.detach().double()
    if scale is not None and len(scale) == weight.shape[0] * weight.shape[1]:
        weight = weight * scale.to(weight.device).view(*weight.shape[:2], 1, 1)
    if moments.shape[1] == 1:
        return weight.square().sum((1, 3)).flatten() * moments.flatten().to(weight.device)
    gains = torch.einsum("goci,gocj->gcij", weight, weight).flatten(0, 1)
    return (gains * moments.to(gains.device)).sum((1, 2)).clamp(min=0)
