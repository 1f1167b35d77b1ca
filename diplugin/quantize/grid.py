"""Integer grids: where quantized numbers may stand, and why their scales have few significant bits.

A weight of output channel c stands at `scale[c] * k`, k an integer of that channel's own width (0, 2, 4 or 8 bits; at 0
bits only k = 0). The integers are two's complement, one level more below zero than above; a *negative* scale turns that
round, so a channel picks the side where its weights need the level: at 2 bits that is the fourth of four levels.
An activation stands at `scale * (k - zero_point)`, k in 0 … 255.

Scales are rounded to a few significant bits, activations' to one (a power of two) by default. Then every product of a
weight and an activation, and every sum of a layer, is a small integer times a short number: exact in float32 whatever
the order of the sum. Two runtimes that add in different orders then agree to the last bit, and no activation falls on
different sides of a rounding edge in them; with free scales such flips spread from layer to layer. (Our addition.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BIT_WIDTHS = (0, 2, 4, 8)
ACTIVATION_LEVELS = 255


def short(values: Tensor, significant_bits: int) -> Tensor:
    """Each value rounded to a float of `significant_bits` significant bits (0 stays 0).

    >>> short(torch.tensor([0.3, 5.2]), 1)
    tensor([0.2500, 4.0000])
    """
    mantissa, exponent = torch.frexp(values)
    step = 2.0**significant_bits
    return torch.ldexp(torch.round(mantissa * step) / step, exponent)


def limits(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest integer of each width: [C] -> [C], [C]; both 0 at 0 bits."""
    half = torch.where(bits > 0, 2.0 ** (bits - 1).clamp(min=0), torch.zeros(()))
    return -half, (half - 1).clamp(min=0)


@dataclass(frozen=True)
class WeightGrid:
    """One grid per output channel: `bits` int64 [C] out of {0, 2, 4, 8}; `scale` float32 [C], of either sign."""

    bits: Tensor
    scale: Tensor

    def integers(self, weight: Tensor) -> Tensor:
        """Nearest grid integers of `weight` [C, D], as float32 [C, D]."""
        low, high = limits(self.bits)
        return torch.round(weight / self.scale[:, None]).clamp(low[:, None], high[:, None])

    def project(self, weight: Tensor) -> Tensor:
        """Nearest grid values of `weight` [C, D]."""
        return self.integers(weight) * self.scale[:, None]


def fit_weight_grid(
    weight: Tensor, bits: Tensor, *, importance: Tensor | None = None, significant_bits: int = 5, steps: int = 24
) -> WeightGrid:
    """The scale of every channel with the least squared rounding error, clipping included.

    Args:
        weight: [C, D], one row per output channel.
        bits: int64 [C].
        importance: [C, D] or [1, D] weights of the squared errors (the inputs' mean squares), None for equal ones.
        significant_bits: of a scale.
        steps: candidates per channel and sign, from 0.35 of the largest magnitude's scale to all of it.
    """
    low, _ = limits(bits)
    full = weight.abs().amax(1).clamp(min=1e-12) / low.abs().clamp(min=1)
    # A channel of no bits has a scale too, small: its bias stands on a multiple of it.
    scale = torch.where(bits > 0, short(full, significant_bits), torch.tensor(2.0**-8))
    best_error = torch.full_like(full, torch.inf)
    for factor in torch.linspace(0.35, 1.25, steps).tolist():
        for sign in (1.0, -1.0):
            candidate = WeightGrid(bits, short(full * (factor * sign), significant_bits))
            squares = (candidate.project(weight) - weight).square()
            error = (squares if importance is None else squares * importance).sum(1)
            better = (error < best_error) & (bits > 0)
            best_error = torch.where(better, error, best_error)
            scale = torch.where(better, candidate.scale, scale)
    return WeightGrid(bits, scale)


def with_room(scale: Tensor, bias: Tensor, inputs: ActivationGrid) -> Tensor:
    """Scales [C] under which `bias` [C] is a number of 30 bits in steps of the products, as int8 kernels hold it in 32.

    Only a channel whose weights are as good as zero beside its bias gets another one, a power of two.
    """
    least = bias.abs() / (2.0**30 * inputs.scale)
    return torch.where(scale.abs() < least, 2.0 ** torch.ceil(torch.log2(least)), scale)


class Scales(Protocol):
    """How scales are fitted: `weight` [C, D], `bits` [C], `importance` [C, D] of squared errors -> a grid."""

    def __call__(self, weight: Tensor, bits: Tensor, importance: Tensor) -> WeightGrid: ...


@dataclass(frozen=True)
class ChannelScales:
    """A scale for every output channel, of `significant_bits` significant bits."""

    significant_bits: int = 5

    def __call__(self, weight: Tensor, bits: Tensor, importance: Tensor) -> WeightGrid:
        return fit_weight_grid(weight, bits, importance=importance, significant_bits=self.significant_bits)


@dataclass(frozen=True)
class TensorScale:
    """One scale for all channels of the same width: the baseline that channel scales have to beat."""

    significant_bits: int = 5

    def __call__(self, weight: Tensor, bits: Tensor, importance: Tensor) -> WeightGrid:
        scale = torch.ones(len(weight))
        for width in bits.unique():
            rows = bits == width
            joined = fit_weight_grid(weight[rows].reshape(1, -1), width[None],
                                     importance=importance.expand_as(weight)[rows].reshape(1, -1),
                                     significant_bits=self.significant_bits)  # fmt: skip
            scale[rows] = joined.scale
        return WeightGrid(bits, scale)


@dataclass(frozen=True)
class ActivationGrid:
    """8-bit grid of one tensor: values `scale * (k - zero_point)`, k in 0 … 255."""

    scale: float
    zero_point: int

    def project(self, x: Tensor) -> Tensor:
        """Grid values of `x`, any shape. It divides, as ONNX's QuantizeLinear does: a product may round otherwise."""
        low, high = -float(self.zero_point), float(ACTIVATION_LEVELS - self.zero_point)
        return torch.round(x / self.scale).clamp(low, high) * self.scale


def fit_activation_grid(values: Tensor, *, significant_bits: int = 1) -> ActivationGrid:
    """The grid with the least squared error on sample `values` (any shape): scales of `significant_bits` only.

    A tensor without negative values gets zero point 0: its zeros are exact and all 256 levels lie above them.
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    span = max(high - low, 1e-8)
    zero_point = round(-low / span * ACTIVATION_LEVELS)
    scales = {float(short(torch.tensor(span / ACTIVATION_LEVELS * f), significant_bits))
              for f in torch.logspace(-3, 1, 33, base=2.0).tolist()}  # fmt: skip
    grids = [ActivationGrid(scale, zero_point) for scale in sorted(scales)]
    return min(grids, key=lambda grid: float((grid.project(values) - values).square().mean()))
