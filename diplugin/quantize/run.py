"""Quantize a trained model: fold, observe, allocate bits, round, fine-tune if asked."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from ..costs import Budget
from ..errors import ModelError
from ..features import Forward, GetLabels, device_of, forward_inputs, labels_of
from ..recovery import train
from .allocation import BitAllocation, Choice, Limit
from .costs import BitOperations, FileSize, LayerShape
from .export import QuantizedExport, export_model
from .fake import QUANTIZABLE, put_on_grid
from .folding import fold_batchnorm
from .grid import ActivationGrid, WeightGrid, fit_activation_grid
from .observe import LayerStatistics, observe
from .settings import Bits
from .strategies import Task


@dataclass(frozen=True)
class QuantizedResult:
    """A quantized model and what it costs.

    Attributes:
        model: the fake-quantized torch model, in eval mode: layers compute with grid values in float32.
        allocation: bits of every output channel.
        size_mb: predicted size of its ONNX file, 10^6 bytes.
        uniform8_size_mb: of the same model with 8 bits everywhere; its file's real size.
        bops: multiply-accumulates × weight bits × 8 activation bits, one image.
        kept_float: layer -> why it was not quantized.
        weights: weights per output channel of every quantized layer.
        bits: the settings.
    """

    model: nn.Module
    allocation: BitAllocation
    size_mb: float
    uniform8_size_mb: float
    bops: float
    kept_float: Mapping[str, str]
    weights: Mapping[str, int]
    bits: Bits


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    example_inputs: tuple[Any, ...],
    bits: Bits | None = None,
    *,
    budgets: Sequence[Budget] | None = None,
    training_loader: Iterable[Any] | None = None,
    teacher: nn.Module | None = None,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
) -> QuantizedResult:
    """Give every output channel of a trained model its own bit width, under budgets.

    Args:
        model: trained, pruned or not; it is not changed.
        loader: calibration data, batches of (inputs, labels); training data only.
        example_inputs: positional inputs at batch 1, a tuple of tensors.
        bits: settings; `Bits()` if None.
        budgets: in place of `bits.budgets`.
        training_loader: for `bits.finetune`, the calibration data if None.
        teacher: for `bits.finetune`, the float model if None.

    Raises:
        ModelError: weights that are not finite, no layer that can be quantized, a model that does not run or export.
        DataError: no calibration data.
        InfeasibleBudget: the budget is below the smallest reachable cost, which the message names.

    >>> from diplugin import Budget
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    >>> data = [(torch.randn(50, 3, 8, 8), torch.arange(50) % 4)]
    >>> result = quantize(net, data, (data[0][0][:1],), budgets=[Budget("size_mb", fraction=0.9)])
    >>> result.size_mb <= 0.9 * result.uniform8_size_mb
    True
    """
    bits = bits or Bits()
    bits = replace(bits, budgets=tuple(budgets)) if budgets is not None else bits
    _check_weights(model)
    folded = fold_batchnorm(copy.deepcopy(model).float(), example_inputs)
    seen = observe(folded, loader, images=bits.images, rho=bits.rho, get_labels=get_labels, forward=forward,
                   seed=bits.seed)  # fmt: skip
    kept_float = _kept_float(folded, seen)
    statistics = {name: s for name, s in seen.items() if name not in kept_float}
    if not statistics:
        raise ModelError("expected a convolution or linear layer that can be quantized, the model runs none")
    bench = _Bench(folded, statistics, bits)
    shapes = {name: bench.shape(name) for name in statistics}
    size = _size_model(bench, shapes, example_inputs, bits)
    operations = BitOperations(shapes)
    task = replace(bench.task, limits=tuple(_limit(budget, size, operations, shapes) for budget in bits.budgets))
    chosen = bits.strategy.allocate(task)
    quantized = bench.build(chosen)
    if bits.finetune is not None:
        train(quantized, training_loader if training_loader is not None else loader, bits.finetune,
              teacher=teacher if teacher is not None else model, seed=bits.seed, get_labels=get_labels,
              forward=forward)  # fmt: skip
    allocation = BitAllocation({layer: tuple(int(b) for b in widths) for layer, widths in chosen.items()})
    return QuantizedResult(
        quantized.eval(), allocation, size.total(chosen), size.total(_uniform8(shapes)), operations.total(chosen),
        kept_float, {name: shape.weights for name, shape in shapes.items()}, bits,
    )  # fmt: skip


def export_quantized(result: QuantizedResult, path: str | Path, example_inputs: tuple[Any, ...]) -> QuantizedExport:
    """Write the result's ONNX file; see `export.export_model`."""
    return export_model(result.model, path, example_inputs, layout=result.bits.layout)


class _Bench:
    """The folded model with what was observed of it, ready to be built at any bits."""

    def __init__(self, model: nn.Module, statistics: Mapping[str, LayerStatistics], bits: Bits) -> None:
        self.model, self.statistics, self.bits = model, statistics, bits
        self.device = device_of(model)
        names = list(statistics)
        fixed = bits.ends.fixed(names)
        widths = {name: (fixed[name],) if name in fixed else tuple(sorted(set(bits.widths))) for name in names}
        channels = {name: len(model.get_submodule(name).weight) for name in names}  # pyright: ignore
        cpu_model = copy.deepcopy(model).cpu()
        self.task = Task(cpu_model, statistics, Choice(widths, channels), (), bits.rounding, bits.weight_scale_bits)
        self.grids: dict[str, ActivationGrid] = {
            name: fit_activation_grid(torch.cat(s.samples), significant_bits=bits.activation_scale_bits)
            for name, s in statistics.items()
        }

    def shape(self, layer: str) -> LayerShape:
        weight = self.task.weight(layer)
        return LayerShape(len(weight), weight.shape[1], self.statistics[layer].macs)

    def build(self, chosen: Mapping[str, np.ndarray]) -> nn.Module:
        """The fake-quantized model: each channel's row as rounded at its width, biases making up for the mean error."""
        model = copy.deepcopy(self.model).cpu()
        for name, widths in chosen.items():
            layer: Any = model.get_submodule(name)
            exact = self.task.weight(name)
            values, scale = exact.clone(), torch.ones(len(exact))
            for width in sorted({int(b) for b in widths}):
                rows = torch.from_numpy(np.flatnonzero(widths == width))
                rounded = self.task.rounded(name, width)
                values[rows], scale[rows] = rounded.values[rows], rounded.grid.scale[rows]
            put_on_grid(layer, WeightGrid(torch.from_numpy(widths.astype(np.int64)), scale), self.grids[name])
            layer.weight = values.view_as(layer.weight)
            layer.bias = layer.bias.detach() + self._mean_error(name, exact - values)
        return model.to(self.device)

    def _mean_error(self, layer: str, error: torch.Tensor) -> torch.Tensor:
        statistics = self.statistics[layer]
        mean = (statistics.mean / max(1, statistics.patches)).float()
        return torch.einsum("gcd,gd->gc", error.view(len(mean), -1, error.shape[1]), mean).flatten()


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"expected finite weights, {name} holds NaN or infinity")


def _kept_float(model: nn.Module, seen: Mapping[str, LayerStatistics]) -> dict[str, str]:
    """Layers with parameters that stay in float, and why."""
    reasons = {}
    for name, module in model.named_modules():
        if not any(True for _ in module.parameters(recurse=False)):
            continue
        kind = type(module).__name__
        if not isinstance(module, QUANTIZABLE):
            reasons[name] = f"{kind} is not a kind that can be quantized"
        elif parametrize.is_parametrized(module):
            reasons[name] = f"{kind} is parametrized already"
        elif name not in seen:
            reasons[name] = f"{kind} was not called by the forward pass"
        elif seen[name].repeated:
            reasons[name] = f"{kind} is called more than once in a forward pass"
    return reasons


def _uniform8(shapes: Mapping[str, LayerShape]) -> dict[str, np.ndarray]:
    return {name: np.full(shape.channels, 8) for name, shape in shapes.items()}


def _size_model(
    bench: _Bench, shapes: Mapping[str, LayerShape], example_inputs: tuple[Any, ...], bits: Bits
) -> FileSize:
    """File size by bits; the part that does not depend on them is read off a real file with 8 bits everywhere."""
    import tempfile

    model = FileSize(shapes, bits.layout.overhead)
    uniform = _uniform8(shapes)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "uniform8.onnx"
        written = export_model(bench.build(uniform), path, example_inputs, layout=bits.layout)
    return replace(model, fixed=written.size_mb - model.total(uniform))


def _limit(budget: Budget, size: FileSize, operations: BitOperations, shapes: Mapping[str, LayerShape]) -> Limit:
    cost = size if budget.cost == "size_mb" else operations
    most = budget.limit if budget.limit is not None else float(budget.fraction or 0) * cost.total(_uniform8(shapes))
    return Limit(cost, most)
