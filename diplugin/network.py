"""What a network is made of, as plain data: its layers with their shapes, and how wide each side is.

`trace_network` runs the model once and records every call of every convolution, linear layer and normalisation; it
asks `groups` which channels hang together; and it has that claim *checked* on the network itself (`verification`): a
group that is not what it seems is left alone, with a note.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .dependency import tensors_of, traceable
from .errors import ModelError, first_line
from .groups import ChannelGroup, Side, trace_groups
from .layer_calls import LayerCall, set_call, watching_calls
from .verification import verified

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm)
_ACTIVATIONS = {
    "Relu": "relu", "Hardtanh": "relu6", "Hardswish": "hardswish", "Silu": "silu", "Gelu": "gelu",
    "Sigmoid": "sigmoid", "Hardsigmoid": "hardsigmoid", "LeakyRelu": "leaky_relu", "Tanh": "tanh",
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one input: enough to trace a fresh model again."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def example(self, generator: torch.Generator | None = None) -> Tensor:
        """A random tensor of this shape (zeros for integer types)."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point:
            return torch.randn(self.shape, generator=generator).to(dtype)
        return torch.zeros(self.shape, dtype=dtype)


def specs_of(example_inputs: tuple[Any, ...]) -> tuple[TensorSpec, ...]:
    """What a fresh model can be traced with again.

    Raises:
        ModelError: not a tuple, or list, of tensors.
    """
    if not isinstance(example_inputs, (tuple, list)):
        raise ModelError(f"expected example_inputs as a tuple such as (x,), got {type(example_inputs).__name__}")
    odd = [type(x).__name__ for x in example_inputs if not isinstance(x, Tensor)]
    if odd:
        raise ModelError(f"expected tensors as example inputs, got {odd[0]}; bind it in a wrapping module")
    return tuple(TensorSpec.of(x) for x in example_inputs)


@dataclass(frozen=True)
class LayerSpec:
    """One call of one layer at batch 1.

    `op` is "conv", "conv_transpose", "linear" or "norm"; `kernel` … `dilation` are empty unless it convolves;
    `activation` names the activation that follows it directly or behind a BatchNorm, None if there is none.
    """

    name: str
    op: str
    in_channels: int
    out_channels: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False
    activation: str | None = None

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels


@dataclass(frozen=True)
class Width:
    """Channels of one layer side: `fixed` ones that no group owns, and `per_root` for every root a group keeps."""

    fixed: int
    parts: tuple[tuple[str, int], ...] = ()

    def at(self, widths: Mapping[str, int]) -> int:
        return self.fixed + sum(per_root * widths[group] for group, per_root in self.parts)


@dataclass(frozen=True)
class NetworkTrace:
    """Groups, layer calls in execution order, and the inputs they were traced with.

    `parameters` holds every tensor of `model.parameters()` as (qualified name, shape).
    """

    groups: tuple[ChannelGroup, ...]
    layers: tuple[LayerSpec, ...]
    inputs: tuple[TensorSpec, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False, default=())

    @cached_property
    def by_name(self) -> dict[str, ChannelGroup]:
        return {group.name: group for group in self.groups}

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for group in self.groups if group.prunable)

    @property
    def base_widths(self) -> dict[str, int]:
        """Root channels of every prunable group, unpruned: the search's starting point."""
        return {group.name: group.channels for group in self.prunable}

    @cached_property
    def _owned(self) -> dict[tuple[str, Side], list[tuple[str, int]]]:
        owned: dict[tuple[str, Side], list[tuple[str, int]]] = {}
        for group in self.prunable:
            for m in group.members:
                owned.setdefault((m.layer, m.side), []).append((group.name, group.multiplicity(m)))
        return owned

    def width(self, layer: str, side: Side, channels: int) -> Width:
        """How wide a layer side of `channels` unpruned channels is, as a function of the groups' widths."""
        parts = tuple(self._owned.get((layer, side), ()))
        return Width(channels - sum(per_root * self.by_name[g].channels for g, per_root in parts), parts)

    def channels_of(self, roots: Mapping[str, Collection[int]], side: Side) -> dict[str, set[int]]:
        """Convolution or linear layer -> its channels on one side that belong to these root channels of groups."""
        found: dict[str, set[int]] = {}
        for group in self.prunable:
            for member in group.side(side, ("weighted", "depthwise")):
                found.setdefault(member.layer, set()).update(member.channels_of(roots.get(group.name, ())))
        return found


def trace_network(model: nn.Module, example_inputs: tuple[Any, ...], *, verify: bool = True) -> NetworkTrace:
    """Record the layers and channel groups of a model.

    Args:
        model: left as it was: weights, modes, `requires_grad`.
        example_inputs: positional inputs, a tuple of tensors, batch 1 for costs to be per image.
        verify: check every group on a pruned copy (about two further forward passes and a copy of the model).

    Raises:
        ModelError: the model does not run, or returns nothing that depends on its weights.
    """
    groups = trace_groups(model, example_inputs)
    inputs = specs_of(example_inputs)
    if verify:
        groups = verified(model, example_inputs, groups)
    parameters = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    layers = tuple(record_layers(model, example_inputs))
    return NetworkTrace(_in_execution_order(groups, layers), layers, inputs, parameters)


def _in_execution_order(groups: Iterable[ChannelGroup], layers: Sequence[LayerSpec]) -> tuple[ChannelGroup, ...]:
    """Groups by the first call of any layer that produces them: the order in which people read a network."""
    calls: dict[str, int] = {}
    for i, layer in enumerate(layers):
        calls.setdefault(layer.name, i)
    last = len(layers)

    def first_call(group: ChannelGroup) -> int:
        return min((calls.get(m.layer, last) for m in group.members if m.side == "out"), default=last)

    return tuple(sorted(groups, key=first_call))


def record_layers(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[LayerSpec]:
    """Every call of every convolution, linear and normalisation layer, in execution order."""
    kinds = (*_CONVS, *_TRANSPOSED, nn.Linear, *_NORMS)
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    runs: list[tuple[str, Tensor, Tensor, Any, tuple[int, ...]]] = []

    def record(name: str, x: Any, y: Any, call: LayerCall | None) -> None:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if call is not None and not call.kernel:
                x = call.x  # a linear layer may pool or flatten maps first: its rows are those that it multiplies
            runs.append((name, x, y, y.grad_fn, _padding(modules[name], x, y, call)))

    try:
        with traceable(model), watching_calls(modules, record):
            output = model(*example_inputs)
    except Exception as error:
        raise ModelError(f"expected a model that runs on the example inputs, got {first_line(error)}") from error
    consumers = _consumers(tensors_of(output))
    return [_layer_spec(name, modules[name], x, y, _activation(fn, consumers), padding)
            for name, x, y, fn, padding in runs]  # fmt: skip


def _layer_spec(
    name: str, module: Any, x: Tensor, y: Tensor, activation: str | None, padding: tuple[int, ...]
) -> LayerSpec:
    shapes = (tuple(x.shape), tuple(y.shape))
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, (*_CONVS, *_TRANSPOSED)):
        op = "conv" if isinstance(module, _CONVS) else "conv_transpose"
        if x.dim() == len(module.kernel_size) + 1:  # one image without its batch dimension
            shapes = ((1, *x.shape), (1, *y.shape))
        return LayerSpec(
            name, op, module.in_channels, module.out_channels, *shapes, tuple(module.kernel_size),
            tuple(module.stride), padding, tuple(module.dilation), module.groups, bias, activation,
        )  # fmt: skip
    if isinstance(module, nn.Linear):
        return LayerSpec(name, "linear", module.in_features, module.out_features, *shapes, (), (), (), (), 1, bias,
                         activation)  # fmt: skip
    # A LayerNorm's own shape, not its input's: subclasses for maps [N, C, H, W] move the channels inside.
    channels = module.normalized_shape[-1] if isinstance(module, nn.LayerNorm) else x.shape[1]
    return LayerSpec(name, "norm", channels, channels, *shapes, bias=bias, activation=activation)


def _padding(module: Any, x: Tensor, y: Tensor, call: LayerCall | None) -> tuple[int, ...]:
    """Zeros on both sides of each dimension that give an output of this size, whoever pads, and however lopsidedly."""
    if not isinstance(module, (*_CONVS, *_TRANSPOSED)):
        return ()
    call = call or set_call(module, x)
    if call.transposed:
        return tuple(before for before, _ in call.padding)
    dims, found = len(call.kernel), []
    sides = zip(call.padding, call.kernel, call.stride, call.dilation, strict=True)
    for i, ((before, behind), k, s, d) in enumerate(sides, start=-dims):
        total = max(0, call.x.shape[i] - x.shape[i] + before + behind)  # a layer may make its map smaller first
        more = (x.shape[i] + 2 * ((total + 1) // 2) - d * (k - 1) - 1) // s + 1
        found.append((total + 1) // 2 if more == y.shape[i] else total // 2)
    return tuple(found)


def _consumers(outputs: Iterable[Tensor]) -> dict[Any, list[Any]]:
    """Autograd nodes by the node whose result they read."""
    consumers: dict[Any, list[Any]] = {}
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for source, _ in node.next_functions:
            if source is not None:
                consumers.setdefault(source, []).append(node)
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
    return consumers


def _activation(node: Any, consumers: Mapping[Any, list[Any]]) -> str | None:
    """The activation that reads a layer's output, directly or behind its normalisation."""
    while node is not None:
        readers = consumers.get(node, [])
        if len(readers) != 1:
            return None
        node = readers[0]
        kind = type(node).__name__.partition("Backward")[0]
        if kind in _ACTIVATIONS:
            return _ACTIVATIONS[kind]
        if "BatchNorm" not in kind:
            return None
    return None
