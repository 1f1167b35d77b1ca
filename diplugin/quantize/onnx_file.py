"""The ONNX form of a fake-quantized model: integers of 2, 4 and 8 bits on disk, QuantizeLinear and DequantizeLinear.

The float model's graph is rewritten: every quantized layer's input passes QuantizeLinear and DequantizeLinear (8 bits,
shared by all readers of one tensor), its weights are stored as INT8, INT4 and INT2 tensors, the channels of one width
together. Opset 21 knows 4 bits, opset 25 knows 2 bits; ONNX Runtime loads both at their true size.

How channels of several widths become one layer again is the `layouts`' affair.

ONNX Runtime dequantizes mixed weights anew in every run unless the session entry `session.disable_quant_qdq` is "1";
then it does so once, when it loads the file, and gives the same numbers. ResNet-20, one x86-64 thread, one image:
float32 0.9 ms, 8 bits 1.4 ms, mixed 2.5 ms, mixed with that entry 1.2 ms (`SplitLayers` 4.4 and 2.5 ms).

On the way to a small file: tensors get names of a letter or two (a layer's node keeps its name), equal scales are
stored once, attributes that say the default are dropped. ONNX is imported on use.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ModelError
from .grid import ActivationGrid
from .layouts import GraphBuilder, Layout, Operand, StoredLayer

INT2_OPSET, INT4_OPSET = 25, 21
_READERS = ("Conv", "Gemm", "MatMul")


def rewrite(proto: Any, layers: Sequence[StoredLayer], layout: Layout) -> Any:
    """Replace the float weights of `layers` in an exported model by stored integers; changes and returns `proto`.

    Raises:
        ModelError: a layer's weight is not in the graph as the operand of a convolution or matrix product.
    """
    absent = absent_layers(proto, layers)
    if absent:
        raise ModelError(f"expected every quantized layer in the exported graph, {', '.join(absent)} cannot be found")
    graph = proto.graph
    arrays = _arrays(graph)
    owners = _owners(arrays, layers)
    build = GraphBuilder()
    inputs: dict[tuple[str, ActivationGrid], str] = {}
    for node in graph.node:
        owner = owners.get(_weight_of(node))
        if owner is None:
            build.nodes.append(node)
            continue
        layer, transposed = owner
        key = (node.input[0], layer.activation)
        if key not in inputs:
            inputs[key] = _on_grid(build, *key)
        bias = arrays[node.input[2]] if len(node.input) > 2 else None
        layout.write(build, layer, Operand(node, inputs[key], transposed, bias))
    _replace(graph, build)
    _slim(graph, {layer.name for layer in layers})
    return proto


def absent_layers(proto: Any, layers: Sequence[StoredLayer]) -> list[str]:
    """Names of layers whose weight no convolution or matrix product of the graph reads: it may be computed with first,
    have been merged with what follows, be another layer's as well, or matter to no output."""
    owners = _owners(_arrays(proto.graph), layers)
    found = {owners[name][0].name for name in map(_weight_of, proto.graph.node) if name in owners}
    return [layer.name for layer in layers if layer.name not in found]


def _arrays(graph: Any) -> dict[str, np.ndarray]:
    from onnx import numpy_helper

    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def _weight_of(node: Any) -> str:
    """The name of what a node takes as its weight; "" if it takes none."""
    return node.input[1] if node.op_type in _READERS and len(node.input) > 1 else ""


def _owners(arrays: Mapping[str, np.ndarray], layers: Sequence[StoredLayer]) -> dict[str, tuple[StoredLayer, bool]]:
    """Initializer name -> (layer whose weight it is, whether it stands transposed): by name, else by value."""
    owners: dict[str, tuple[StoredLayer, bool]] = {}
    for layer in layers:
        named = f"{layer.name}.weight"
        for name, array in arrays.items():
            if name in owners or (named in arrays and name != named):
                continue
            if array.shape == layer.weight.shape and np.array_equal(array, layer.weight):
                owners[name] = (layer, False)
                break
            if array.ndim == 2 and array.shape == layer.weight.shape[::-1] and np.array_equal(array.T, layer.weight):
                owners[name] = (layer, True)
                break
    return owners


def _on_grid(build: GraphBuilder, tensor: str, grid: ActivationGrid) -> str:
    scale = build.array(np.array(grid.scale, np.float32))
    zero = build.array(np.array(grid.zero_point, np.uint8))
    return build.node("DequantizeLinear", [build.node("QuantizeLinear", [tensor, scale, zero]), scale, zero])


def _replace(graph: Any, build: GraphBuilder) -> None:
    """Put the built nodes in, and keep only initializers that are read."""
    nodes = list(build.nodes)
    read = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    kept = [t for t in graph.initializer if t.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *build.initializers])


def _slim(graph: Any, layers: set[str]) -> None:
    """Short tensor names, no node names but the layers', no attribute that says the default."""
    from onnx import AttributeProto

    nested = any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for n in graph.node for a in n.attribute)
    edges = {value.name for value in (*graph.input, *graph.output)}
    fresh = _short_names(edges)
    names = {name: name for name in (*edges, "")}
    for node in graph.node:
        if node.name.rpartition(":")[0] not in layers and node.name not in layers:
            node.ClearField("name")
        if node.op_type == "Conv":
            kept = [a for a in node.attribute if not _is_default(a)]
            del node.attribute[:]
            node.attribute.extend(kept)
        for tensors in () if nested else (node.input, node.output):
            for i, name in enumerate(tensors):
                if name not in names:
                    names[name] = next(fresh)
                tensors[i] = names[name]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)


def _is_default(attribute: Any) -> bool:
    if attribute.name in ("dilations", "strides"):
        return all(i == 1 for i in attribute.ints)
    if attribute.name == "group":
        return attribute.i == 1
    return attribute.name == "auto_pad" and attribute.s == b"NOTSET"


def _short_names(taken: set[str]) -> Iterator[str]:
    letters = string.ascii_letters
    spelled = ("".join(name) for length in itertools.count(1) for name in itertools.product(letters, repeat=length))
    return (name for name in spelled if name not in taken)
