"""The fake-quantized model: the same modules, computing in float32 with numbers that stand on their integer grids.

A quantized layer keeps its class and its name. Its `weight` and `bias` are parametrized (torch's own
`nn.utils.parametrize`): reading them gives grid values, writing and training them moves the float value behind.
Its input passes an 8-bit grid first. Gradients go straight through the rounding and stop where a value is clipped, so
the model can be fine-tuned as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .grid import ActivationGrid, WeightGrid, limits

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)


def _straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of `gradient_of`."""
    return value.detach() + (gradient_of - gradient_of.detach())


class WeightOnGrid(nn.Module):
    """Parametrization of a weight [C, ...]: every output channel on its own grid."""

    bits: Tensor
    scale: Tensor

    def __init__(self, grid: WeightGrid) -> None:
        super().__init__()
        self.register_buffer("bits", grid.bits)
        self.register_buffer("scale", grid.scale)

    @property
    def grid(self) -> WeightGrid:
        return WeightGrid(self.bits, self.scale)

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        low, high = limits(self.bits)
        ends = torch.stack((low * self.scale, high * self.scale))
        clipped = torch.minimum(torch.maximum(rows, ends.amin(0)[:, None]), ends.amax(0)[:, None])
        return _straight_through(self.grid.project(rows), clipped).view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class BiasOnGrid(nn.Module):
    """Parametrization of a bias [C]: whole multiples of the layer's products' step, input scale times weight scale."""

    step: Tensor

    def __init__(self, step: Tensor) -> None:
        super().__init__()
        self.register_buffer("step", step)

    def forward(self, bias: Tensor) -> Tensor:
        return _straight_through(torch.round(bias / self.step) * self.step, bias)

    def right_inverse(self, bias: Tensor) -> Tensor:
        return bias


class InputOnGrid(nn.Module):
    """A layer's input on its 8-bit grid."""

    def __init__(self, grid: ActivationGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        ends = (-self.grid.zero_point * self.grid.scale, (255 - self.grid.zero_point) * self.grid.scale)
        return _straight_through(self.grid.project(x), x.clamp(*ends))

    def extra_repr(self) -> str:
        return f"scale={self.grid.scale}, zero_point={self.grid.zero_point}"


def _quantize_input(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (layer.input_on_grid(args[0]), *args[1:]), named
    return args, {name: layer.input_on_grid(x) for name, x in named.items()}


def put_on_grid(layer: Any, weight: WeightGrid, inputs: ActivationGrid) -> None:
    """Make a conv or linear layer a fake-quantized one, in place; a layer without a bias gets one (of zeros)."""
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0]))
    layer.weight = nn.Parameter(layer.weight.detach().clone())  # its own: others may share it, on grids of theirs
    parametrize.register_parametrization(layer, "weight", WeightOnGrid(weight))
    parametrize.register_parametrization(layer, "bias", BiasOnGrid(inputs.scale * weight.scale.abs()))
    layer.add_module("input_on_grid", InputOnGrid(inputs))
    layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def take_off_grid(layer: Any) -> None:
    """Leave the grid values as plain weight and bias, and the input as it is; hooks that others have set stay."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _quantize_input]:
        del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]
    del layer.input_on_grid
    # torch's remove_parametrizations would alter the class that copies share with the original.
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer.parametrizations
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)


def is_on_grid(module: nn.Module) -> bool:
    return isinstance(getattr(module, "input_on_grid", None), InputOnGrid)


def layers_on_grid(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every fake-quantized layer."""
    return ((name, module) for name, module in model.named_modules() if is_on_grid(module))


def weight_grid(layer: nn.Module) -> WeightGrid:
    return layer.parametrizations.weight[0].grid  # pyright: ignore


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Conv1d, Conv2d and Linear modules with a weight of their own, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZABLE)}
