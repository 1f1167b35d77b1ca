"""Quantize a trained model: fold, observe, allocate bits, round, fine-tune if asked."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from ..boundary import GuardedLoader, guarded_forward, guarded_labels
from ..costs import Budget
from ..errors import ModelError, first_line
from ..features import Forward, GetLabels, device_of, forward_inputs, labels_of
from ..recovery import train
from .allocation import BitAllocation, Choice, Limit
from .costs import BitOperations, FileSize, LayerShape
from .export import QuantizedExport, export_model, float_graph, stored_layers, write_model
from .fake import QUANTIZABLE, put_on_grid
from .folding import fold_batchnorm
from .grid import ActivationGrid, WeightGrid, fit_activation_grid, with_room
from .observe import LayerStatistics, observe
from .onnx_file import absent_layers
from .settings import Bits
from .strategies import BitStrategy, Task


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
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 5), nn.Flatten(), nn.Linear(128, 4)).eval()
    >>> data = [(torch.randn(50, 3, 8, 8), torch.arange(50) % 4)]
    >>> result = quantize(net, data, (data[0][0][:1],), budgets=[Budget("size_mb", fraction=0.9)])
    >>> result.size_mb <= 0.9 * result.uniform8_size_mb
    True
    """
    bits = bits or Bits()
    bits = replace(bits, budgets=tuple(budgets)) if budgets is not None else bits
    quantizer = Quantizer(model, loader, example_inputs, bits, get_labels=get_labels, forward=forward)
    result = quantizer.spend(bits.strategy, bits.budgets)
    if bits.finetune is not None:
        train(result.model, training_loader if training_loader is not None else loader, bits.finetune,
              teacher=teacher if teacher is not None else model, seed=bits.seed, get_labels=get_labels,
              forward=forward).eval()  # fmt: skip
    return result


def export_quantized(
    result: QuantizedResult, path: str | Path, example_inputs: tuple[Any, ...], checked: tuple[Any, ...] | None = None
) -> QuantizedExport:
    """Write the result's ONNX file; see `export.export_model`."""
    return export_model(result.model, path, example_inputs, layout=result.bits.layout, checked=checked)


class Quantizer:
    """A model made ready once, to be quantized by several strategies under several budgets.

    Arguments and errors are those of `quantize`; `bits.strategy`, `bits.budgets` and `bits.finetune` are not used.

    Attributes:
        kept_float: layer -> why it stays in float.
        task: what strategies may know, without limits.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        example_inputs: tuple[Any, ...],
        bits: Bits | None = None,
        *,
        get_labels: GetLabels = labels_of,
        forward: Forward = forward_inputs,
    ) -> None:
        self.bits = bits = bits or Bits()
        _check_weights(model)
        self._device = device_of(model)
        folded = fold_batchnorm(_copied(model).float(), example_inputs)
        seen = observe(folded, GuardedLoader(loader), images=bits.images, rho=bits.rho, seed=bits.seed,
                       get_labels=guarded_labels(get_labels), forward=guarded_forward(forward))  # fmt: skip
        self.kept_float = _kept_float(folded, seen)
        self._grids: dict[str, ActivationGrid] = {
            name: fit_activation_grid(torch.cat(s.samples), significant_bits=bits.activation_scale_bits)
            for name, s in seen.items() if name not in self.kept_float
        }  # fmt: skip
        self._take(folded.cpu(), seen)
        self._size = self._size_model(example_inputs)
        self._operations = BitOperations(self._shapes)

    def spend(self, strategy: BitStrategy, budgets: Sequence[Budget]) -> QuantizedResult:
        """Allocate bits within the budgets and build the model.

        Raises:
            InfeasibleBudget: a budget is below the smallest reachable cost.
        """
        widths = strategy.allocate(replace(self.task, limits=tuple(self._limit(budget) for budget in budgets)))
        return self.at(widths)

    def at(self, widths: Mapping[str, np.ndarray]) -> QuantizedResult:
        """The model with these bits per channel: layer -> [C] out of 0, 2, 4, 8, for every quantized layer."""
        allocation = BitAllocation({layer: tuple(int(b) for b in row) for layer, row in widths.items()})
        return QuantizedResult(
            self._build(widths).eval(), allocation, self._size.total(widths), self._size.total(self.uniform(8)),
            self._operations.total(widths), self.kept_float, {n: s.weights for n, s in self._shapes.items()}, self.bits,
        )  # fmt: skip

    def uniform(self, width: int) -> dict[str, np.ndarray]:
        """The same bits for every channel of every quantized layer."""
        return {name: np.full(shape.channels, width) for name, shape in self._shapes.items()}

    def _choice(self, model: nn.Module) -> Choice:
        names = list(self._statistics)
        fixed = self.bits.ends.fixed(names)
        free = tuple(sorted(set(self.bits.widths)))
        channels = {name: len(model.get_submodule(name).weight) for name in names}  # pyright: ignore
        return Choice({name: (fixed[name],) if name in fixed else free for name in names}, channels)

    def _shape(self, layer: str) -> LayerShape:
        weight = self.task.weight(layer)
        return LayerShape(len(weight), weight.shape[1], self._statistics[layer].macs)

    def _take(self, model: nn.Module, seen: Mapping[str, LayerStatistics]) -> None:
        """Quantize all that was seen and does not stay in float."""
        self._statistics = {name: s for name, s in seen.items() if name not in self.kept_float}
        if not self._statistics:
            raise ModelError("expected a convolution or linear layer that can be quantized, the model runs none")
        self.task = Task(model, self._statistics, self._choice(model), (), self.bits.rounding, self.bits.scales)
        self._shapes = {name: self._shape(name) for name in self._statistics}

    def _size_model(self, example_inputs: tuple[Any, ...]) -> FileSize:
        """File size by bits; what does not depend on them is read off a real file with 8 bits everywhere."""
        model = self._build(self.uniform(8))
        graph = float_graph(model, example_inputs)
        absent = absent_layers(graph, stored_layers(model))
        if absent:
            reason = "is no convolution or matrix product of its own in the exported graph"
            self.kept_float |= {n: f"{type(model.get_submodule(n)).__name__} {reason}" for n in absent}
            self._take(self.task.model, self._statistics)
            return self._size_model(example_inputs)
        size = FileSize(self._shapes, self.bits.layout.overhead)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "uniform8.onnx"
            written = write_model(graph, model, path, example_inputs, self.bits.layout)
        return replace(size, fixed=written.size_mb - size.total(self.uniform(8)))

    def _limit(self, budget: Budget) -> Limit:
        cost = self._size if budget.cost == "size_mb" else self._operations
        most = budget.limit if budget.limit is not None else float(budget.fraction or 0) * cost.total(self.uniform(8))
        return Limit(cost, most)

    def _build(self, chosen: Mapping[str, np.ndarray]) -> nn.Module:
        """The fake-quantized model: each channel's row as rounded at its width, biases making up for the mean error."""
        model = copy.deepcopy(self.task.model)
        for name, widths in chosen.items():
            layer: Any = model.get_submodule(name)
            exact = self.task.weight(name)
            values, scale = exact.clone(), torch.ones(len(exact))
            for width in sorted({int(b) for b in widths}):
                rows = torch.from_numpy(np.flatnonzero(widths == width))
                rounded = self.task.rounded(name, width)
                values[rows], scale[rows] = rounded.values[rows], rounded.grid.scale[rows]
            shift, inputs = self._mean_error(name, exact - values), self._grids[name]
            bias: torch.Tensor | None = layer.bias
            scale = with_room(scale, shift if bias is None else bias.detach() + shift, inputs)
            put_on_grid(layer, WeightGrid(torch.from_numpy(widths.astype(np.int64)), scale), inputs)
            layer.weight = values.view_as(layer.weight)
            layer.bias = layer.bias.detach() + shift
        return model.to(self._device)

    def _mean_error(self, layer: str, error: torch.Tensor) -> torch.Tensor:
        statistics = self._statistics[layer]
        mean = (statistics.mean / max(1, statistics.patches)).float()
        return torch.einsum("gcd,gd->gc", error.view(len(mean), -1, error.shape[1]), mean).flatten()


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"expected a model that can be copied, got {first_line(error)}; weights that hooks compute must be made "
            "plain first (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove)"
        ) from error


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
        elif parametrize.is_parametrized(module) or "weight" not in module._parameters:
            reasons[name] = f"{kind} computes its weight or bias anew in every call"
        elif name not in seen:
            reasons[name] = f"{kind} was not called by the forward pass"
        elif seen[name].repeated:
            reasons[name] = f"{kind} is called more than once in a forward pass"
    return reasons
