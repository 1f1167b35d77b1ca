"""A float graph as the 8-bit one that is deployed: quantize-dequantize pairs around every operator that runtimes fuse.

One transformation serves single operators, the edges of their graphs and whole nets, so that an entry measures what a
net contains. Time does not depend on values, so all scales are alike and all weights one number: nothing is
calibrated here, and a net stays as small as its structure.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

SCALE = 0.02
_FLOAT = 1
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FUSED = ("Relu", "Clip")
#: Operators whose inputs and outputs are 8-bit; everything else computes in float between them.
_EIGHT_BIT = (
    *_WEIGHTED, *_FUSED, "Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul",
    "Reshape", "Sigmoid", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip


def quantize_graph(proto: Any, *, edges: bool, dense: bool = False) -> None:
    """Turn a float ONNX model, in place, into its 8-bit form: uint8 activations, int8 weights, int32 biases.

    Args:
        proto: a model without its own quantization; weights as initializers or `ConstantOfShape`.
        edges: inputs and outputs are uint8 themselves; otherwise they stay float and are converted in the graph.
        dense: for TensorRT: weights stored as they are, activations signed, biases left in float.
    """
    _Quantizer(proto, edges, dense).run()


def eight_bit(blob: bytes) -> bytes:
    """A finished float ONNX file as the 8-bit one that an 8-bit table speaks of: its structure, not its values."""
    import onnx

    proto = onnx.load_from_string(blob)
    quantize_graph(proto, edges=False)
    return proto.SerializeToString()


class _Quantizer:
    def __init__(self, proto: Any, edges: bool, dense: bool) -> None:
        import onnx

        self.graph, self.edges, self.dense = proto.graph, edges, dense
        self.kind = "int8" if dense else "uint8"
        known = onnx.shape_inference.infer_shapes(proto).graph
        typed = [*known.input, *known.value_info, *known.output]
        self.floats = {v.name for v in typed if v.type.tensor_type.elem_type == _FLOAT}
        self.shapes = _constant_shapes(self.graph)
        self.readers: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.written_by = {name: node for node in self.graph.node for name in node.output}
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.renamed: dict[str, str] = {}
        self.stored: set[str] = set()

    def run(self) -> None:
        from onnx import TensorProto

        outputs: dict[str, Any] = {v.name: v for v in self.graph.output}
        for value in self.graph.input:
            if value.name in self.floats and value.name not in self.shapes:
                if self.edges:
                    value.type.tensor_type.elem_type = TensorProto.UINT8
                    self.renamed[value.name] = self._dequantized(value.name)
                elif self._eight_bit(value.name):
                    self._pair(value.name)
        for node in list(self.graph.node):
            self._node(node)
            for name in node.output:
                if self._eight_bit(name) or (self.edges and name in outputs):
                    self._pair(name)
        for name, value in outputs.items():
            if self.edges:
                value.name = name + "/q"
                value.type.tensor_type.elem_type = TensorProto.UINT8
            else:
                value.name = self.renamed.get(name, name)
        self._replace()

    def _eight_bit(self, name: str) -> bool:
        """Whether a tensor is 8-bit: a float one that such an operator writes or reads, not fused into its reader."""
        if name not in self.floats or name in self.shapes:
            return False
        readers, writer = self.readers.get(name, []), self.written_by.get(name)
        kinds = [node.op_type for node in readers]
        if writer is None:
            return any(kind in _EIGHT_BIT for kind in kinds)
        if writer.op_type == "Constant":
            return False
        fused = len(kinds) == 1 and kinds[0] in _FUSED and writer.op_type in (*_WEIGHTED, "Add")
        return not fused and any(kind in _EIGHT_BIT for kind in (writer.op_type, *kinds))

    def _pair(self, name: str) -> None:
        self._make("QuantizeLinear", [name, self._scale(), self._zero(self.kind)], name + "/q")
        self.renamed[name] = self._dequantized(name + "/q", name)

    def _dequantized(self, name: str, stem: str = "") -> str:
        return self._make("DequantizeLinear", [name, self._scale(), self._zero(self.kind)], (stem or name) + "/dq")

    def _node(self, node: Any) -> None:
        """The node with its inputs exchanged for what they have become."""
        inputs = []
        for place, name in enumerate(node.input):
            if name in self.shapes and node.op_type in _WEIGHTED and place == 1:
                inputs.append(self._weight(name, "int8"))
            elif name in self.shapes and node.op_type in _WEIGHTED and place == 2 and not self.dense:
                inputs.append(self._weight(name, "int32"))
            elif name in self.shapes and node.op_type in ("Add", "Mul", "Concat"):
                inputs.append(self._weight(name, self.kind))
            else:
                inputs.append(self.renamed.get(name, name))
        del node.input[:]
        node.input.extend(inputs)
        self.nodes.append(node)

    def _weight(self, name: str, dtype: str) -> str:
        """A float constant as integers that are dequantized; biases in the product of the scales."""
        import numpy as np

        shape, stored = self.shapes[name], f"{name}/{dtype}"
        if stored not in self.stored:
            self.stored.add(stored)
            self._store(stored, shape, dtype)
        scale = self._constant("int8/scale2", np.float32(SCALE**2)) if dtype == "int32" else self._scale()
        # One for every reader: runtimes fuse none that is shared.
        return self._make("DequantizeLinear", [stored, scale, self._zero(dtype)], f"{stored}/dq{len(self.nodes)}")

    def _store(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        import numpy as np
        from onnx import helper

        value = 3 if dtype == "int8" else 0
        if self.dense or prod(shape) < 64:
            self._constant(name, np.full(shape, value, dtype))
            return
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        sizes = self._constant(name + "/shape", np.array(shape, np.int64))
        self._make("ConstantOfShape", [sizes], name, value=helper.make_tensor("value", kind, [1], [value]))

    def _scale(self) -> str:
        import numpy as np

        return self._constant("int8/scale", np.float32(SCALE))

    def _zero(self, dtype: str) -> str:
        import numpy as np

        return self._constant(f"int8/zero/{dtype}", np.zeros((), dtype))

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def _make(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _replace(self) -> None:
        """The graph's nodes and initializers by the new ones, without those that nothing reads any more."""
        wanted = {name for node in self.nodes for name in node.input} | {v.name for v in self.graph.output}
        nodes = [n for n in self.nodes if wanted & {*n.output}]
        read = {name for node in nodes for name in node.input}
        kept = [t for t in self.graph.initializer if t.name in read]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend([*kept, *self.constants.values()])


def _constant_shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the float constants: initializers, `ConstantOfShape` of one, and other names for the same."""
    from onnx import numpy_helper

    by_name: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    found = {name: tuple(tensor.dims) for name, tensor in by_name.items() if tensor.data_type == _FLOAT}
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in by_name and _fills_floats(node.attribute):
            found[node.output[0]] = tuple(int(n) for n in numpy_helper.to_array(by_name[node.input[0]]))
        elif node.op_type == "Identity" and node.input[0] in found:  # how torch stores equal weights once
            found[node.output[0]] = found[node.input[0]]
    return found


def _fills_floats(attributes: Iterable[Any]) -> bool:
    return all(a.t.data_type == _FLOAT for a in attributes if a.name == "value")
