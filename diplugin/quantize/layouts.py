"""How a layer whose channels have several widths is written as ONNX nodes.

A `Layout` turns a layer's integers into nodes that end in the layer's own output. `JoinedWeights` dequantizes the
parts, joins them and puts the rows back in order: one convolution, the smallest file, the faster of the two.
`SplitLayers` runs one convolution per width and joins the outputs. ONNX is imported on use.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .grid import ActivationGrid


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer as numbers: `integers` int8 [C, ...], `bits`, float32 `scale` [C]; `weight` is the product."""

    name: str
    integers: np.ndarray
    bits: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    activation: ActivationGrid


def packed(integers: np.ndarray, bits: int) -> bytes:
    """Two's complement integers packed as ONNX stores them: the first in the lowest bits of a byte.

    >>> packed(np.array([1, -1, 0], np.int8), 4).hex()
    'f100'
    """
    per_byte = 8 // bits
    fields = integers.astype(np.int64).ravel() & ((1 << bits) - 1)
    fields = np.pad(fields, (0, -len(fields) % per_byte)).reshape(-1, per_byte)
    return (fields << (bits * np.arange(per_byte))).sum(1).astype(np.uint8).tobytes()


class GraphBuilder:
    """Nodes and initializers under construction; new tensors get names that no exporter uses."""

    def __init__(self) -> None:
        self._fresh = (f"~{i}" for i in itertools.count())
        self._scalars: dict[bytes, str] = {}
        self.initializers: list[Any] = []
        self.nodes: list[Any] = []

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        from onnx import helper

        output = self.name()
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def name(self) -> str:
        """A tensor name not used before."""
        return next(self._fresh)

    def array(self, values: np.ndarray) -> str:
        from onnx import numpy_helper

        if values.size > 1:
            return self._add(numpy_helper.from_array(values))
        key = values.tobytes() + str((values.dtype, values.shape)).encode()
        if key not in self._scalars:
            self._scalars[key] = self._add(numpy_helper.from_array(values))
        return self._scalars[key]

    def integers(self, values: np.ndarray, bits: int) -> str:
        from onnx import TensorProto

        kinds = {2: TensorProto.INT2, 4: TensorProto.INT4, 8: TensorProto.INT8}
        return self._add(TensorProto(dims=values.shape, data_type=kinds[bits], raw_data=packed(values, bits)))

    def _add(self, tensor: Any) -> str:
        tensor.name = self.name()
        self.initializers.append(tensor)
        return tensor.name


@dataclass(frozen=True)
class Operand:
    """Where a layer's weight stands: `transposed` if the graph holds [in, out]; `bias` is a tensor name or ""."""

    node: Any
    source: str
    transposed: bool
    bias: np.ndarray | None


class Layout(Protocol):
    """How a layer whose channels have several widths is written."""

    def write(self, build: GraphBuilder, layer: StoredLayer, operand: Operand) -> None:
        """Append the layer's nodes; the last one gives `operand.node`'s output."""
        ...

    def overhead(self, bits: np.ndarray) -> float:
        """Bytes beside packed weights and scales, to about twenty a layer."""
        ...


def _parts(layer: StoredLayer) -> list[tuple[int, np.ndarray]]:
    """(width, channels) of every width above zero, widest first."""
    found = [(b, np.flatnonzero(layer.bits == b)) for b in (8, 4, 2)]
    return [(b, channels) for b, channels in found if len(channels)]


def _dequantized(build: GraphBuilder, layer: StoredLayer, width: int, channels: np.ndarray, transposed: bool) -> str:
    values = layer.integers[channels]
    stored = build.integers(values.T if transposed else values, width)
    axis = {} if transposed else {"axis": 0}
    return build.node("DequantizeLinear", [stored, build.array(layer.scale[channels])], **axis)


def _reordered(build: GraphBuilder, joined: str, order: np.ndarray, axis: int) -> str:
    """Rows of `joined`, of which row i is channel `order[i]`, in the order of channels."""
    from onnx import TensorProto

    index = np.argsort(order)
    if (index == np.arange(len(index))).all():
        return joined
    kind = np.uint8 if len(index) <= 256 else np.int32  # bytes on disk; Gather wants int32 or int64
    stored = build.array(index.astype(kind))
    if kind is np.uint8:
        stored = build.node("Cast", [stored], to=TensorProto.INT32)
    return build.node("Gather", [joined, stored], **({"axis": axis} if axis else {}))


def _order(layer: StoredLayer, parts: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    return np.concatenate([channels for _, channels in parts] + [np.flatnonzero(layer.bits == 0)])


@dataclass(frozen=True)
class JoinedWeights:
    """One layer: its dequantized weights joined, channels without bits padded with zeros, rows put in order."""

    def write(self, build: GraphBuilder, layer: StoredLayer, operand: Operand) -> None:
        parts = _parts(layer)
        axis = 1 if operand.transposed else 0
        pieces = [_dequantized(build, layer, b, channels, operand.transposed) for b, channels in parts]
        # A lone 2-bit part passes a Concat of one: ONNX Runtime 1.32 would fuse it into an int8 kernel that rejects it.
        alone = len(parts) == 1 and parts[0][0] != 2
        weight = pieces[0] if alone else build.node("Concat", pieces, axis=axis)
        silent = int((layer.bits == 0).sum())
        if silent:
            pads, axes = build.array(np.array([0, silent])), build.array(np.array([axis]))
            weight = build.node("Pad", [weight, pads, "", axes])
        weight = _reordered(build, weight, _order(layer, parts), axis)
        bias = [] if operand.bias is None else [build.array(operand.bias)]
        build.nodes.append(_copy(operand.node, [operand.source, weight, *bias], layer.name))

    def overhead(self, bits: np.ndarray) -> float:
        used = {int(b) for b in bits} - {0}
        joined = 6.0 if used in ({4}, {8}) else 36.0
        return 81.0 * len(used) + joined + (71.0 if (bits == 0).any() else 0.0) + _order_bytes(bits)


@dataclass(frozen=True)
class SplitLayers:
    """One convolution (or matrix product) per width; their outputs joined and put in order. Only for layers without
    groups; a layer with silent channels or a MatMul is written as `JoinedWeights` does."""

    def write(self, build: GraphBuilder, layer: StoredLayer, operand: Operand) -> None:
        from onnx import helper

        parts = _parts(layer)
        grouped = any(a.name == "group" and a.i != 1 for a in operand.node.attribute)
        if len(parts) < 2 or (layer.bits == 0).any() or grouped or operand.node.op_type == "MatMul":
            JoinedWeights().write(build, layer, operand)
            return
        outputs = []
        for b, channels in parts:
            weight = _dequantized(build, layer, b, channels, operand.transposed)
            bias = [] if operand.bias is None else [build.array(operand.bias[channels])]
            part = _copy(operand.node, [operand.source, weight, *bias], f"{layer.name}:{b}")
            part.output[0] = build.name()
            build.nodes.append(part)
            outputs.append(part.output[0])
        joined = build.node("Concat", outputs, axis=1)
        result = _reordered(build, joined, _order(layer, parts), 1)
        build.nodes.append(helper.make_node("Identity", [result], [operand.node.output[0]]))

    def overhead(self, bits: np.ndarray) -> float:
        used = len({int(b) for b in bits} - {0})
        joined = JoinedWeights().overhead(bits)
        return joined if used < 2 or (bits == 0).any() else joined + 58.0 * used - 40.0


def _order_bytes(bits: np.ndarray) -> float:
    """Bytes that putting the channels back in order takes; none if their widths fall already."""
    if (np.diff(bits) <= 0).all():
        return 0.0
    return 61.0 + len(bits) if len(bits) <= 256 else 41.0 + 4 * len(bits)


def _copy(node: Any, inputs: Sequence[str], name: str) -> Any:
    import onnx

    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    del copied.input[:]
    copied.input.extend(inputs)
    copied.name = name
    return copied
