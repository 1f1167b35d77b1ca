"""Ways to spend bits: by Discriminant Information, and the baselines that it has to beat.

Each is a small frozen object with one method, from a `Task` (what is known of the model) to bits per channel. All but
`UniformBits` differ in nothing but the table of damages that they give to the same search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .allocation import Choice, Limit, cheapest, least_damage
from .grid import Scales, WeightGrid
from .observe import LayerStatistics
from .rounding import Rounding

#: Mean squared error of rounding a Gaussian at its best step (0, 2, 4, 8 bits), relative to its variance: Max (1960).
GAUSSIAN_ERROR = {0: 1.0, 2: 0.1188, 4: 0.01154, 8: 0.000116}


@dataclass(frozen=True)
class RoundedLayer:
    """One layer at one width: `values` [C, D] on `grid`."""

    grid: WeightGrid
    values: Tensor


@dataclass(frozen=True)
class Task:
    """What an allocation may know: the folded model, what was observed, what may be chosen and what it may cost."""

    model: nn.Module
    statistics: Mapping[str, LayerStatistics]
    choice: Choice
    limits: tuple[Limit, ...]
    rounding: Rounding
    scales: Scales

    @cached_property
    def _rounded(self) -> dict[tuple[str, int], RoundedLayer]:
        return {}

    def weight(self, layer: str) -> Tensor:
        """The layer's weight as rows, float32 [C, D] on the CPU."""
        module: Any = self.model.get_submodule(layer)
        return module.weight.detach().flatten(1).float().cpu()

    def rounded(self, layer: str, width: int) -> RoundedLayer:
        """The layer with all its channels at `width` bits; channels do not depend on each other's widths."""
        key = (layer, width)
        if key not in self._rounded:
            weight, statistics = self.weight(layer), self.statistics[layer]
            gram = (statistics.gram / max(1, statistics.patches)).float()
            energy = torch.diagonal(gram, dim1=2, dim2=3).flatten(1).repeat_interleave(len(weight) // len(gram), 0)
            bits = torch.full((len(weight),), width, dtype=torch.int64)
            grid = self.scales(weight, bits, energy)
            values = torch.zeros_like(weight)
            if width:
                parts = zip(weight.chunk(gram.shape[1], 1), gram.unbind(1), strict=True)
                integers = torch.cat([self.rounding(part, block, grid) for part, block in parts], 1)
                values = integers * grid.scale[:, None]
            self._rounded[key] = RoundedLayer(grid, values)
        return self._rounded[key]


class BitStrategy(Protocol):
    """Bits of every channel of every layer of the task, within its limits."""

    @property
    def name(self) -> str: ...

    def allocate(self, task: Task) -> dict[str, np.ndarray]: ...


def _search(task: Task, damage: Any) -> dict[str, np.ndarray]:
    tables = {layer: np.stack([damage(layer, b) for b in widths], 1) for layer, widths in task.choice.widths.items()}
    return least_damage(tables, task.choice, task.limits)


@dataclass(frozen=True)
class DIBits:
    """By the label information that rounding disturbs (our reading).

    The error E_c that channel c's map gets from rounding is scored as if it were a channel itself, with the unperturbed
    layer's Z: 2ρ‖E_cᵀZ‖²/‖Y‖². For 0 bits E = −F, and this is the channel's own DI score. It is quadratic in the error,
    as the loss is; the first-order change 2ρ⟨W_c, E_cᵀZ⟩ (`discriminant.perturbation_scores`) is of either sign and
    allocated worse in every trial. Damages of all layers are in one unit, the fraction of label variance.
    """

    name: str = "di"

    def allocate(self, task: Task) -> dict[str, np.ndarray]:
        return _search(task, lambda layer, width: di_damage(task, layer, width))


def di_damage(task: Task, layer: str, width: int) -> np.ndarray:
    """2ρ‖E_cᵀZ‖²/‖Y‖² of every output channel at `width` bits, float64 [C], averaged over chunks of images.

    A layer that sees something else than images (windows of them, or tokens first) is taken to carry all there is: its
    share of the output that is error counts as the share of label variance.
    """
    module: Any = task.model.get_submodule(layer)
    error = (task.rounded(layer, width).values - task.weight(layer)).view(module.weight.shape)
    images, call = task.statistics[layer].label_images, task.statistics[layer].call
    if not images:
        return output_error(task, layer, width) / len(error)
    total = torch.zeros(len(error), dtype=torch.float64)
    with torch.no_grad():
        for x in images:
            y = call.of(x, error).square()
            total += (y.transpose(0, 1).flatten(1).sum(1) if call.kernel else y.flatten(0, -2).sum(0)).double()
    return (2 * total / len(images)).numpy()


@dataclass(frozen=True)
class OutputErrorBits:
    """By measurement without labels: mean squared error of the channel's output relative to the layer's mean square."""

    name: str = "output error"

    def allocate(self, task: Task) -> dict[str, np.ndarray]:
        return _search(task, lambda layer, width: output_error(task, layer, width))


def output_error(task: Task, layer: str, width: int) -> np.ndarray:
    """Error variance of every output channel at `width` bits over the mean variance of the layer's, float64 [C]."""
    statistics = task.statistics[layer]
    patches = max(1, statistics.patches)
    blocks = statistics.gram.shape[1]
    mean = (statistics.mean / patches).unflatten(1, (blocks, -1))
    spread = statistics.gram / patches - mean[..., :, None] * mean[..., None, :]
    weight = task.weight(layer).double()
    error = task.rounded(layer, width).values.double() - weight
    squares, scale = (_variance(rows, spread) for rows in (error, weight))
    scale = scale.mean()
    return (squares / scale.clamp(min=1e-30)).clamp(min=0).numpy()


def _variance(rows: Tensor, spread: Tensor) -> Tensor:
    """wᵀΣw of every row [C, D], Σ in blocks [G, B, D/B, D/B]: [C]."""
    parts = rows.reshape(len(spread), -1, spread.shape[1], spread.shape[2])
    return torch.einsum("gcbi,gbij,gcbj->gc", parts, spread, parts).flatten()


@dataclass(frozen=True)
class MagnitudeBits:
    """By weights alone: squared norm of the channel times the relative error that a Gaussian has at each width."""

    name: str = "magnitude"

    def allocate(self, task: Task) -> dict[str, np.ndarray]:
        return _search(task, lambda layer, width: self._damage(task, layer, width))

    def _damage(self, task: Task, layer: str, width: int) -> np.ndarray:
        return task.weight(layer).square().sum(1).double().numpy() * GAUSSIAN_ERROR[width]


@dataclass(frozen=True)
class RandomBits:
    """By chance: every channel draws how much it matters (per weight), the search is the same."""

    seed: int = 0
    name: str = "random"

    def allocate(self, task: Task) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(self.seed)
        draws = {layer: np.exp(generator.normal(0.0, 2.0, count)) for layer, count in task.choice.channels.items()}
        share = {layer: task.weight(layer).shape[1] for layer in draws}
        return _search(task, lambda layer, width: draws[layer] * share[layer] * GAUSSIAN_ERROR[width])


@dataclass(frozen=True)
class UniformBits:
    """The same for every layer: the widest width that fits everywhere, and in each layer as large a share of the
    channels (the first ones) at the next width as still fits. Dead channels are not looked for."""

    name: str = "uniform"

    def allocate(self, task: Task) -> dict[str, np.ndarray]:
        above_zero = sorted({b for widths in task.choice.widths.values() for b in widths if b})
        best = cheapest(task.choice, task.limits)
        for narrow, wide in zip(above_zero, [*above_zero[1:], above_zero[-1]], strict=True):
            for share in np.linspace(0, 1, 65):
                bits = {layer: self._layer(task.choice, layer, narrow, wide, share) for layer in task.choice.widths}
                if all(limit.holds(bits) for limit in task.limits):
                    best = bits
        return best

    def _layer(self, choice: Choice, layer: str, narrow: int, wide: int, share: float) -> np.ndarray:
        widths, channels = choice.widths[layer], choice.channels[layer]
        if len(widths) == 1:
            return np.full(channels, widths[0])
        first = round(channels * share)
        return np.array([wide] * first + [narrow] * (channels - first))
