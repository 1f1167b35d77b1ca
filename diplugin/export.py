"""ONNX export that proves itself: one self-contained file, run against the torch model before it is written.

The exporter folds BatchNorm into the convolutions, as runtimes want it. What it leaves behind is cleaned up: weights
move into the file, and the stack traces and source paths that it attaches to every node are dropped. The batch is a
free dimension wherever the model allows it. The file appears under its name only after ONNX Runtime has given the
torch model's outputs, on the example inputs and on a batch of another size.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .dependency import traceable
from .errors import ModelError, UserError, first_line
from .features import device_of
from .onnx_inference import array_of, open_session, run_session
from .plan import PruningPlan
from .surgery import PLAN_FILE, load_pruned
from .whole_files import write_bytes

OPSET = 18
RELATIVE_TOLERANCE = 1e-3
_CHECKED_BATCH = 3


@dataclass(frozen=True)
class ExportCheck:
    """What was written, and how near ONNX Runtime came to torch on it.

    Attributes:
        path: the ONNX file.
        size_mb: its size in 10^6 bytes, weights included.
        max_abs_difference: between the outputs of ONNX Runtime and torch, over all outputs and checked batches.
        max_abs_output: largest output of torch, the scale of that difference.
        dynamic_batch: whether the file takes any batch size; otherwise the example's only.
    """

    path: Path
    size_mb: float
    max_abs_difference: float
    max_abs_output: float
    dynamic_batch: bool


def export_onnx(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    opset: int = OPSET,
) -> ExportCheck:
    """Write a model as one ONNX file, if ONNX Runtime gives the same outputs with it.

    Args:
        model: exported in eval mode; its modes and weights are left as they were.
        example_inputs: positional inputs, a tuple of tensors.
        path: overwritten atomically, and only when the check has passed.
        dynamic_batch: leave the first dimension of every input open, where the model allows it.
        opset: ONNX operator set; 18 is the oldest that the exporter writes without conversion.

    Raises:
        ModelError: the model cannot be exported (its forward depends on the values of its inputs, say), or the
            exported one disagrees.
        UserError: the path cannot be written.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     check = export_onnx(net, (torch.randn(1, 3, 8, 8),), f"{folder}/net.onnx")
    >>> check.dynamic_batch, check.max_abs_difference < 1e-4
    (True, True)
    """
    path = Path(path)
    if not isinstance(example_inputs, tuple) or not example_inputs or not all(_is_tensor(x) for x in example_inputs):
        raise ModelError(f"expected example_inputs as a tuple of tensors such as (x,), got {_kinds(example_inputs)}")
    inputs = tuple(x.detach().cpu() for x in example_inputs)
    if device_of(model).type != "cpu":  # accelerators may round more coarsely than the check allows
        model = copy.deepcopy(model).cpu()
    with traceable(model), torch.no_grad():
        references = [(inputs, _reference(model, inputs))]
        proto = None
        wider = _batch_of(inputs, _CHECKED_BATCH) if dynamic_batch else None
        if wider is not None:
            try:
                references.append((wider, _reference(model, wider)))
                proto = _export(model, _batch_of(inputs, 2) or inputs, len(references[0][1]), opset, dynamic=True)
                difference, scale = _compare(proto, references)
            except ModelError:  # the model is tied to its batch size: export it for that one
                proto, references = None, references[:1]
        if proto is None:
            proto = _export(model, inputs, len(references[0][1]), opset, dynamic=False)
            difference, scale = _compare(proto, references)
    content = proto.SerializeToString()
    write_onnx(path, content)
    return ExportCheck(path, len(content) / 1e6, difference, scale, len(references) > 1)


def export_run(
    folder: str | Path, fresh_model: nn.Module, path: str | Path, *, dynamic_batch: bool = True
) -> ExportCheck:
    """Export the pruned network of a run folder, rebuilt from its plan and weights.

    Args:
        folder: holds `plan.json` and `weights.safetensors`.
        fresh_model: the unpruned architecture, with any weights; it is pruned in place.

    Raises:
        PlanError: the folder holds no plan or weights for this architecture.
        ModelError: as in `export_onnx`.
    """
    model = load_pruned(fresh_model, folder)
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(spec.example(generator) for spec in PruningPlan.load(Path(folder) / PLAN_FILE).inputs)
    return export_onnx(model, inputs, path, dynamic_batch=dynamic_batch)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _kinds(inputs: Any) -> str:
    if not isinstance(inputs, tuple):
        return f"a {type(inputs).__name__}"
    return f"({', '.join(type(x).__name__ for x in inputs)})"


def _reference(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[np.ndarray]:
    try:
        outputs = pytree.tree_leaves(model(*inputs))
    except Exception as error:
        shapes = [tuple(x.shape) for x in inputs]
        raise ModelError(f"expected a model that runs on inputs of shapes {shapes}, got {first_line(error)}") from error
    if any(isinstance(x, Tensor) and x.dtype == torch.bfloat16 for x in outputs):
        raise ModelError("expected outputs that can be compared with ONNX Runtime's, got bfloat16; call model.float()")
    arrays = [array_of(x) for x in outputs if isinstance(x, Tensor)]
    if not arrays:
        raise ModelError("expected a model that returns tensors, its outputs hold none")
    if not all(np.isfinite(a).all() for a in arrays if a.dtype.kind == "f"):
        raise ModelError("expected finite outputs to check the export against, the model returns NaN or infinity")
    return arrays


def _batch_of(inputs: tuple[Tensor, ...], rows: int) -> tuple[Tensor, ...] | None:
    """The inputs at another batch size, rows shifted so that they differ; None if they share no first dimension."""
    if any(x.ndim == 0 for x in inputs) or len({len(x) for x in inputs}) != 1:
        return None
    return tuple(torch.cat([x.roll(k, -1) for k in range(rows)])[:rows] for x in inputs)


def _export(model: nn.Module, inputs: tuple[Tensor, ...], outputs: int, opset: int, *, dynamic: bool) -> Any:
    """The exporter's model with everything inside and nothing about this machine in it."""
    names = ["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)]
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
    with _quiet():
        try:
            program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(
                program, dynamo=True, output_names=names, opset_version=opset, verbose=False, external_data=False
            )
        except Exception as error:
            raise ModelError(_refusal(error)) from error
    if exported is None:
        raise ModelError("expected a model that torch.onnx can export, it returned nothing")
    return _cleaned(exported.model_proto)


def _refusal(error: Exception) -> str:
    text = f"{type(error).__name__} {error} {error.__cause__}".lower()
    if "data-dependent" in text or "datadependent" in text:
        return ("expected a forward whose steps do not depend on the values of its inputs, this model branches on "
                "them: ONNX export would keep one branch only; use torch.where or torch.cond")  # fmt: skip
    return f"expected a model that torch.onnx can export, got {type(error).__name__}: {first_line(error)}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns, logs and prints about its own internals; what matters comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cleaned(proto: Any) -> Any:
    import onnx

    graph = proto.graph
    edges = [*graph.input, *graph.output]
    for part in (proto, graph, *graph.node, *graph.initializer, *edges):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    del graph.value_info[:]
    _name_batch(graph.input[0], edges)
    oldest = onnx.helper.find_min_ir_version_for(list(proto.opset_import))
    proto.ir_version = min(proto.ir_version, oldest)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _name_batch(first: Any, edges: Sequence[Any]) -> None:
    """Call the free first dimension "batch" instead of the exporter's symbol, wherever it appears."""
    dims = first.type.tensor_type.shape.dim
    symbol = dims[0].dim_param if len(dims) else ""
    for edge in edges:
        for dim in edge.type.tensor_type.shape.dim:
            if symbol and dim.dim_param == symbol:
                dim.dim_param = "batch"


def _compare(proto: Any, references: Sequence[tuple[tuple[Tensor, ...], list[np.ndarray]]]) -> tuple[float, float]:
    """(largest difference, largest output); both are absolute.

    Raises:
        ModelError: other shapes, or a difference beyond rounding.
    """
    session = open_session(proto.SerializeToString(), 1)
    worst, scale = 0.0, 0.0
    for inputs, expected in references:
        got = run_session(session, _taken(session, inputs))
        if [g.shape for g in got] != [e.shape for e in expected]:
            raise ModelError(f"expected outputs of shapes {[e.shape for e in expected]} from the exported model, "
                             f"ONNX Runtime gives {[g.shape for g in got]}")  # fmt: skip
        for g, e in zip(got, expected, strict=True):
            largest = float(np.abs(e.astype(np.float64)).max(initial=0.0))
            difference = float(np.abs(g.astype(np.float64) - e.astype(np.float64)).max(initial=0.0))
            if not difference <= RELATIVE_TOLERANCE * largest + 1e-6:
                raise ModelError(f"expected ONNX Runtime to give the torch model's outputs (up to {largest:.3g}), they "
                                 f"differ by {difference:.3g}; nothing was written")  # fmt: skip
            worst, scale = max(worst, difference), max(scale, largest)
    return worst, scale


def _taken(session: Any, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(session.get_inputs()) != len(inputs):
        raise ModelError(f"expected a model that uses its {len(inputs)} inputs, the exported one takes "
                         f"{len(session.get_inputs())}")  # fmt: skip
    return inputs


def write_onnx(path: Path, content: bytes) -> None:
    """Write an ONNX file.

    Raises:
        UserError: the path cannot be written.
    """
    try:
        write_bytes(path, content)
    except OSError as error:
        raise UserError(f"expected a file that can be written at {path}, got {error}") from error
