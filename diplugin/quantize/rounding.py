"""Rounding a layer's weights to their grids: to the nearest point, or so that errors pay for each other.

Rounding each weight alone ignores that inputs are correlated. `CompensatedRounding` fixes one input position after the
other and lets the positions still free take over the error, by the inverse of the inputs' second moment: the optimal
brain surgeon's update, in the order-and-Cholesky form of Frantar et al., "GPTQ" (2022). Every output channel keeps its
own grid, so one pass serves all bit widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .grid import WeightGrid, limits


class Rounding(Protocol):
    """`weight` [C, D] and the inputs' second moment `gram` [G, D, D] (G blocks of channels) -> integers [C, D]."""

    def __call__(self, weight: Tensor, gram: Tensor, grid: WeightGrid) -> Tensor: ...


@dataclass(frozen=True)
class NearestRounding:
    """Each weight to the nearest point of its grid."""

    def __call__(self, weight: Tensor, gram: Tensor, grid: WeightGrid) -> Tensor:
        return grid.integers(weight)


@dataclass(frozen=True)
class CompensatedRounding:
    """One input position at a time, the rest absorbing its error.

    Args:
        damping: added to the diagonal of the second moment, as a fraction of its mean.
    """

    damping: float = 0.01

    def __call__(self, weight: Tensor, gram: Tensor, grid: WeightGrid) -> Tensor:
        groups, width = gram.shape[0], gram.shape[1]
        order = torch.diagonal(gram, dim1=1, dim2=2).sum(0).argsort(descending=True)
        gram = gram[:, order][:, :, order].double()
        mean = torch.diagonal(gram, dim1=1, dim2=2).mean(1).clamp(min=1e-12)
        gram = gram + torch.eye(width, dtype=gram.dtype) * (self.damping * mean)[:, None, None]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        factor = torch.linalg.cholesky(inverse, upper=True)
        rows = weight[:, order].double().reshape(groups, -1, width).clone()
        scale = grid.scale.double().reshape(groups, -1)
        low, high = (bound.double().reshape(groups, -1) for bound in limits(grid.bits))
        integers = torch.empty_like(rows)
        for i in range(width):
            integers[:, :, i] = torch.round(rows[:, :, i] / scale).clamp(low, high)
            error = (rows[:, :, i] - integers[:, :, i] * scale) / factor[:, i, i, None]
            rows[:, :, i:] -= error[:, :, None] * factor[:, None, i, i:]
        result = torch.empty_like(integers).reshape(weight.shape)
        result[:, order] = integers.reshape(weight.shape)
        return result.to(weight.dtype)
