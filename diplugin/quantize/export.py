"""Writing the fake-quantized model as an ONNX file, and not before ONNX Runtime has given its outputs."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ModelError
from ..export import export_onnx, write_onnx
from ..modes import evaluating
from ..onnx_inference import run_onnx
from .fake import layers_on_grid, take_off_grid, weight_grid
from .layouts import JoinedWeights, Layout, StoredLayer
from .onnx_file import INT2_OPSET, INT4_OPSET, rewrite

#: A difference beyond this is no rounding edge but a wrong file.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class QuantizedExport:
    """What was written.

    Attributes:
        path: the ONNX file.
        size_mb: its size in 10^6 bytes.
        relative_difference: ‖ONNX Runtime − torch‖ / ‖torch‖ on the checked inputs, the largest of all outputs.
        opset: 25 if 2-bit weights are in the file, else 21.
    """

    path: Path
    size_mb: float
    relative_difference: float
    opset: int


def float_twin(model: nn.Module) -> nn.Module:
    """A copy with the grid values as plain weights and biases, and no grids on the inputs."""
    twin = copy.deepcopy(model).eval()
    for _, layer in list(layers_on_grid(twin)):
        take_off_grid(layer)
    return twin


def stored_layers(model: nn.Module) -> list[StoredLayer]:
    """Integers, scales and input grids of every fake-quantized layer."""
    stored = []
    for name, module in layers_on_grid(model):
        layer: Any = module
        weight, grid = layer.weight.detach().cpu(), weight_grid(layer)
        integers = torch.round(weight.flatten(1) / grid.scale.cpu()[:, None]).view_as(weight)
        stored.append(StoredLayer(name, integers.to(torch.int8).numpy(), grid.bits.cpu().numpy(),
                                  grid.scale.cpu().numpy(), weight.numpy(), layer.input_on_grid.grid))  # fmt: skip
    return stored


def export_model(
    model: nn.Module,
    path: str | Path,
    example_inputs: tuple[Any, ...],
    *,
    layout: Layout | None = None,
    checked: tuple[Any, ...] | None = None,
) -> QuantizedExport:
    """Write a fake-quantized model as one ONNX file.

    Args:
        model: its layers stand on their grids; nothing of it is changed.
        path: overwritten, once ONNX Runtime has agreed with the torch model.
        example_inputs: positional inputs, a tuple of tensors.
        layout: how several widths make one layer; `JoinedWeights()` if None.
        checked: inputs to compare the outputs on, if the file takes any batch; the example if None. Real data checks
            more than noise does.

    Raises:
        ModelError: the model cannot be exported, or ONNX Runtime gives other outputs.
        UserError: the path cannot be written.
    """
    graph = float_graph(model, example_inputs)
    inputs = checked if checked is not None and _takes_any_batch(graph) else example_inputs
    return write_model(graph, model, path, inputs, layout or JoinedWeights())


def _takes_any_batch(proto: Any) -> bool:
    return all(bool(x.type.tensor_type.shape.dim[0].dim_param) for x in proto.graph.input)


def float_graph(model: nn.Module, example_inputs: tuple[Any, ...]) -> Any:
    """The ONNX graph of a fake-quantized model as it is before its weights are stored as integers.

    Raises:
        ModelError: the model cannot be exported.
    """
    import onnx

    opset = _opset(stored_layers(model))
    if opset > onnx.defs.onnx_opset_version():
        raise ModelError(
            f"expected an onnx package that knows opset {opset}, as 2-bit weights need it; update onnx and "
            "onnxruntime, or take widths=(0, 4, 8)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "float.onnx"
        export_onnx(float_twin(model), example_inputs, plain, opset=opset)
        return onnx.load(plain)


def _opset(layers: Sequence[StoredLayer]) -> int:
    return INT2_OPSET if any((layer.bits == 2).any() for layer in layers) else INT4_OPSET


def write_model(
    proto: Any, model: nn.Module, path: str | Path, example_inputs: tuple[Any, ...], layout: Layout
) -> QuantizedExport:
    """Store the integers of a model in its `float_graph`, and write that; otherwise as `export_model`."""
    import onnx

    layers = stored_layers(model)
    rewrite(proto, layers, layout)
    for field in ("producer_name", "producer_version", "domain", "doc_string"):
        proto.ClearField(field)
    proto.ir_version = onnx.helper.find_min_ir_version_for(list(proto.opset_import))
    content = proto.SerializeToString()
    difference = _difference(model, content, example_inputs)
    onnx.checker.check_model(proto, full_check=True)
    write_onnx(Path(path), content)
    return QuantizedExport(Path(path), len(content) / 1e6, difference, _opset(layers))


def _difference(model: nn.Module, content: bytes, inputs: tuple[Any, ...]) -> float:
    with evaluating(model), torch.no_grad():
        expected = [x for x in pytree.tree_leaves(model(*inputs)) if isinstance(x, Tensor)]
    got = run_onnx(content, inputs)
    if [tuple(x.shape) for x in expected] != [x.shape for x in got]:
        raise ModelError(f"expected outputs of shapes {[tuple(x.shape) for x in expected]} from ONNX Runtime, "
                         f"got {[x.shape for x in got]}")  # fmt: skip
    # Of what is no number but a choice, a rounding edge makes another one.
    pairs = [(x.double().cpu().numpy(), y) for x, y in zip(expected, got, strict=True) if x.is_floating_point()]
    difference = max((_relative(y - x, x) for x, y in pairs), default=0.0)
    if not difference <= TOLERANCE:
        raise ModelError(
            f"expected ONNX Runtime to give the quantized model's outputs, they differ by {difference:.2g} of their "
            f"size; nothing was written"
        )
    return difference


def _relative(error: np.ndarray, whole: np.ndarray) -> float:
    return float(np.linalg.norm(error) / max(np.linalg.norm(whole), 1e-12))
