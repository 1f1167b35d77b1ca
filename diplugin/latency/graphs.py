"""The ONNX graphs that a profile bundle times: single operators, their edges, whole nets; all without weights.

A runtime's time does not depend on weight values (denormal numbers aside), so weights are `ConstantOfShape` nodes,
which the runtime folds when it loads: a graph is a few hundred bytes, whatever the layer. The constant is one over
the fan-in, so that activations neither explode nor fade into denormals on the way through a deep net.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

from ..errors import ModelError
from ..tables import OpKey
from .int8 import quantize_graph

OPSET, IR = 17, 8


def operator_graph(key: OpKey, *, dense: bool = False) -> tuple[bytes, list[list[Any]]]:
    """A graph of one operator with its activation, and the inputs to feed: [[name, shape, dtype]].

    Args:
        key: what to build; "int8" gives quantize-dequantize form, which runtimes fuse, with 8-bit edges unless dense.
        dense: store weights as they are, for runtimes that want initializers (TensorRT).

    Raises:
        ModelError: an activation that is not known here.
    """
    builder, shape = _Builder(dense), _input_shape(key)
    y = builder.activation(key.activation, builder.weighted(key, "x"))
    return builder.finish(shape, y, key.dtype), [["x", list(shape), _edge_type(key.dtype, dense)]]


def _edge_type(dtype: str, dense: bool = False) -> str:
    return "uint8" if dtype == "int8" and not dense else "float32"


def edge_graph(
    channels: int, size: tuple[int, ...], batch: int, repeats: int, dtype: str = "float32"
) -> tuple[bytes, list[list[Any]]]:
    """`repeats` operators that do next to nothing: one against two tells what this tensor costs at a graph's edges.

    Runtimes that compute in a blocked layout, or with the channels last, reorder tensors there, which a layer inside a
    net does not pay. In float the operator is a pooling of single pixels, in 8 bits a depthwise 1x1 convolution, since
    it is convolutions that are reordered for.
    """
    builder, name = _Builder(False), "x"
    ones = (1,) * len(size)
    key = OpKey("conv", channels, channels, ones, ones, (0,) * len(size), ones, channels, size, "", batch)
    for _ in range(repeats):
        quantized = dtype == "int8"
        name = builder.weighted(key, name) if quantized else builder.node("MaxPool", [name], kernel_shape=list(ones))
    shape = (batch, channels, *size)
    return builder.finish(shape, name, dtype), [["x", list(shape), _edge_type(dtype)]]


def call_graph() -> tuple[bytes, list[list[Any]]]:
    """A graph that does nothing: the cost of one call."""
    builder = _Builder(False)
    return builder.finish((1, 4), builder.node("Identity", ["x"])), [["x", [1, 4], "float32"]]


def _input_shape(key: OpKey) -> tuple[int, ...]:
    if key.op == "linear":
        return (key.batch, key.cin) if key.size == (1,) else (key.batch, *key.size, key.cin)
    return (key.batch, key.cin, *key.size)


Graph = tuple[bytes, list[list[Any]]]


class Graphs(Protocol):
    """What a plan's jobs are made of, for one runtime: bytes that it loads, and the inputs to feed."""

    edges: bool

    def call(self) -> Graph: ...

    def operator(self, key: OpKey) -> Graph: ...

    def edge(self, channels: int, size: tuple[int, ...], batch: int, repeats: int, dtype: str = "float32") -> Graph: ...

    def net(self, model: Any, example_inputs: tuple[Any, ...], name: str, dtype: str = "float32") -> Graph: ...


class OnnxGraphs:
    """ONNX for ONNX Runtime, or for TensorRT, which wants weights as initializers and reorders nothing of ours."""

    def __init__(self, *, dense: bool = False, edges: bool = True) -> None:
        self.dense, self.edges = dense, edges

    def call(self) -> Graph:
        return call_graph()

    def operator(self, key: OpKey) -> Graph:
        return operator_graph(key, dense=self.dense)

    def edge(self, channels: int, size: tuple[int, ...], batch: int, repeats: int, dtype: str = "float32") -> Graph:
        return edge_graph(channels, size, batch, repeats, dtype)

    def net(self, model: Any, example_inputs: tuple[Any, ...], name: str, dtype: str = "float32") -> Graph:
        return net_graph(model, example_inputs, dense=self.dense, dtype=dtype)


class _Builder:
    """Nodes and initializers of one small graph."""

    def __init__(self, dense: bool) -> None:
        self.dense = dense
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        from onnx import helper

        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        import numpy as np
        from onnx import numpy_helper

        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def filled(self, shape: tuple[int, ...], value: float) -> str:
        import numpy as np
        from onnx import TensorProto, helper

        if self.dense:
            return self.constant(np.full(shape, value, np.float32))
        fill = helper.make_tensor("value", TensorProto.FLOAT, [1], [value])
        return self.node("ConstantOfShape", [self.constant(np.array(shape, np.int64))], value=fill)

    def weighted(self, key: OpKey, x: str) -> str:
        import numpy as np

        if key.op == "linear":
            shape, fan_in = (key.cin, key.cout), key.cin
        elif key.op == "conv":
            shape, fan_in = (key.cout, key.cin // key.groups, *key.kernel), key.cin // key.groups * prod(key.kernel)
        else:
            shape, fan_in = (key.cin, key.cout // key.groups, *key.kernel), key.cin // key.groups * prod(key.kernel)
        weight, bias = self.filled(shape, 1 / fan_in), self.constant(np.zeros(key.cout, np.float32))
        if key.op == "linear":
            if key.size == (1,):
                return self.node("Gemm", [x, weight, bias])
            return self.node("Add", [self.node("MatMul", [x, weight]), bias])
        return self.node(
            "Conv" if key.op == "conv" else "ConvTranspose", [x, weight, bias], kernel_shape=list(key.kernel),
            strides=list(key.stride), pads=[*key.padding, *key.padding], dilations=list(key.dilation),
            group=key.groups,
        )  # fmt: skip

    def activation(self, name: str, x: str) -> str:
        import numpy as np

        simple = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish"}
        if name == "":
            return x
        if name in simple:
            return self.node(simple[name], [x])
        if name == "relu6":
            return self.node("Clip", [x, self.constant(np.float32(0)), self.constant(np.float32(6))])
        if name == "silu":
            return self.node("Mul", [x, self.node("Sigmoid", [x])])
        if name == "hardsigmoid":
            return self.node("HardSigmoid", [x], alpha=1 / 6, beta=0.5)
        if name == "leaky_relu":
            return self.node("LeakyRelu", [x], alpha=0.01)
        if name == "gelu":
            inner = self.node("Div", [x, self.constant(np.float32(2**0.5))])
            inner = self.node("Add", [self.node("Erf", [inner]), self.constant(np.float32(1))])
            return self.node("Mul", [self.node("Mul", [x, inner]), self.constant(np.float32(0.5))])
        raise ModelError(f"expected a known activation behind a layer, got {name!r}: profile without it")

    def finish(self, shape: tuple[int, ...], output: str, dtype: str = "float32") -> bytes:
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)], self.initializers,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
        if dtype == "int8":
            quantize_graph(model, edges=not self.dense, dense=self.dense)
        return model.SerializeToString()


def net_graph(
    model: Any, example_inputs: tuple[Any, ...], *, dense: bool = False, dtype: str = "float32"
) -> tuple[bytes, list[list[Any]]]:
    """A whole net as ONNX with its weights taken out, in float or in 8 bits, and the inputs to feed.

    Raises:
        ModelError: the model cannot be exported.
    """
    import onnx

    names = [f"input_{i}" for i in range(len(example_inputs))]
    proto = onnx.load_from_string(export_bytes(model, example_inputs, names))
    if dtype == "int8":
        quantize_graph(proto, edges=False, dense=dense)
    elif not dense:
        hollow(proto)
    feeds = [[name, list(x.shape), str(x.dtype).removeprefix("torch.")]
             for name, x in zip(names, example_inputs, strict=True)]  # fmt: skip
    return proto.SerializeToString(), feeds


def export_bytes(model: Any, example_inputs: tuple[Any, ...], names: list[str]) -> bytes:
    """ONNX of a model in eval mode; the quick exporter where it can, else the thorough one."""
    import torch

    from ..modes import evaluating

    try:
        with evaluating(model), warnings.catch_warnings(), torch.no_grad(), _without_dumps():
            warnings.simplefilter("ignore")
            buffer: Any = io.BytesIO()
            try:
                torch.onnx.export(model, example_inputs, buffer, input_names=names, opset_version=OPSET,
                                  dynamo=False, verbose=False)  # fmt: skip
            except Exception:
                buffer = io.BytesIO()
                torch.onnx.export(model, example_inputs, buffer, input_names=names, dynamo=True, verbose=False)
            return buffer.getvalue()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"expected a model that exports to ONNX, got {reason}") from error


@contextmanager
def _without_dumps() -> Iterator[None]:
    """Where the quick exporter cannot, torch prints the whole graph before the thorough one has its turn: not here."""
    from torch import _C

    talks: Any = getattr(_C, "_jit_onnx_log", None)
    if talks is None:
        yield
        return
    _C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        _C._jit_onnx_log = talks


def hollow(proto: Any) -> None:
    """Replace, in place, the weights of an ONNX model by constants that the runtime fills in."""
    import numpy as np
    from onnx import helper, numpy_helper

    graph = proto.graph
    neutral = _neutral_values(graph)
    kept, fills = [], []
    for tensor in graph.initializer:
        shape = list(tensor.dims)
        if tensor.data_type != 1 or tensor.name not in neutral:
            kept.append(tensor)
            continue
        sizes = numpy_helper.from_array(np.array(shape, np.int64), f"{tensor.name}/shape")
        value = helper.make_tensor("value", 1, [1], [neutral[tensor.name]])
        fills.append(helper.make_node("ConstantOfShape", [sizes.name], [tensor.name], value=value))
        kept.append(sizes)
    nodes = [*fills, *graph.node]
    del graph.initializer[:]
    del graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def _neutral_values(graph: Any) -> dict[str, float]:
    """The constant that stands for each weight: one over the fan-in; zero biases; BatchNorms that do nothing."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    values: dict[str, float] = {}
    for node in graph.node:
        inputs = [name if name in shapes else None for name in node.input]
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            weight = inputs[1]
            if weight is not None and len(shapes[weight]) >= 2:
                shape = shapes[weight]
                out_first = node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)
                fan_in = prod(shape[1:]) if out_first else prod(shape) // shape[-1]
                values[weight] = 1 / max(1, fan_in)
            if len(inputs) > 2 and inputs[2] is not None:
                values[inputs[2]] = 0.0
        elif node.op_type == "BatchNormalization":
            values |= {name: v for name, v in zip(inputs[1:5], (1.0, 0.0, 0.0, 1.0), strict=True) if name is not None}
    return values
