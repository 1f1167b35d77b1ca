"""An ONNX file run in ONNX Runtime on this machine's CPU: its outputs, and how often it is right.

What comes out is what the file says. On x86 without VNNI, ONNX Runtime's own int8 kernels add pairs of products in 16
bits, which saturate, so there quantized layers are computed without them. Whoever runs a quantized file on such a
machine wants the same session setting.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .accuracy import accuracy
from .errors import ModelError, first_line
from .features import Forward, GetLabels, forward_inputs, labels_of

#: The session setting that leaves ONNX Runtime's int8 kernels out.
NO_INT8_KERNELS = "session.disable_quant_qdq"


def run_onnx(source: str | Path | bytes, inputs: Sequence[Any], threads: int = 1) -> list[np.ndarray]:
    """Outputs of an ONNX model in ONNX Runtime on the CPU.

    Args:
        source: a file, or a serialised model.
        inputs: tensors or arrays, in the order of the model's inputs.

    Raises:
        ModelError: no such file, not an ONNX model, or inputs that do not fit it.
    """
    return run_session(open_session(source, threads), inputs)


def onnx_accuracy(
    source: str | Path | bytes,
    loader: Iterable[Any],
    threads: int = 1,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
) -> float:
    """Share of images that an ONNX model classifies correctly, as `diplugin.accuracy.accuracy` counts and raises.

    Args:
        source: a file, or a serialised model, whose first output is logits [N, classes].
        loader: batches of any size, whatever the model's own.
        forward: `forward(model, batch)`, given a module that runs the file.
    """
    return accuracy(OnnxNetwork(source, threads), loader, get_labels=get_labels, forward=forward)


class OnnxNetwork(nn.Module):
    """An ONNX model for whatever runs modules: batches of any size to the model's first output.

    Raises:
        ModelError: no such file, or not an ONNX model; when called, inputs that do not fit it.
    """

    def __init__(self, source: str | Path | bytes, threads: int = 1) -> None:
        super().__init__()
        self._session = open_session(source, threads)
        shape = self._session.get_inputs()[0].shape
        self._batch = shape[0] if shape and isinstance(shape[0], int) else None

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Inputs in the order of the model's own, or by their names."""
        order = [i.name for i in self._session.get_inputs()]
        if not set(named) <= set(order):
            raise ModelError(
                f"expected inputs by the names {', '.join(order)} of the ONNX model's, got {', '.join(named)}"
            )
        inputs = (*inputs, *(named[name] for name in order if name in named))
        images = len(inputs[0]) if inputs else 0
        size = self._batch or max(1, images)
        parts = []
        for start in range(0, images, size):
            rows = [x[start : start + size] for x in inputs]
            found = run_session(self._session, [_padded(x, size) for x in rows])[0]
            parts.append(torch.from_numpy(found[: len(rows[0])]))
        return torch.cat(parts) if parts else torch.empty(0)


def _padded(x: Tensor, rows: int) -> Tensor:
    """`x` with its last row repeated: a file with a fixed batch takes nothing shorter."""
    return x if len(x) == rows else torch.cat([x, x[-1:].expand(rows - len(x), *x.shape[1:])])


def int8_saturates() -> bool:
    """Whether ONNX Runtime's int8 kernels saturate on this machine: x86 without VNNI, as far as the system tells."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def open_session(source: str | Path | bytes, threads: int = 1) -> Any:
    """A session on the CPU that computes what the file says.

    Raises:
        ModelError: no such file, or not an ONNX model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if int8_saturates():
        options.add_session_config_entry(NO_INT8_KERNELS, "1")
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    model = source if isinstance(source, bytes) else str(source)
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        what = "a model that ONNX Runtime loads" if isinstance(source, bytes) else f"an ONNX model at {source}"
        raise ModelError(f"expected {what}, got {first_line(error)}") from error


def run_session(session: Any, inputs: Sequence[Any]) -> list[np.ndarray]:
    """Outputs for tensors or arrays, in the order of the model's inputs.

    Raises:
        ModelError: inputs that do not fit it.
    """
    names = [i.name for i in session.get_inputs()]
    if len(names) != len(inputs):
        raise ModelError(f"expected {len(names)} inputs ({', '.join(names)}), got {len(inputs)}")
    try:
        return session.run(None, {n: array_of(x) for n, x in zip(names, inputs, strict=True)})
    except Exception as error:
        raise ModelError(f"expected inputs that fit the ONNX model, got {first_line(error)}") from error


def array_of(x: Any) -> np.ndarray:
    """A tensor or anything like an array, as numpy's."""
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
