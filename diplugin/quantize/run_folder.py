"""Quantization inside a run folder: `quantized.onnx` and `bits.json` beside the pruned model, and the figures of both.

The accuracy is the one of the file, run by ONNX Runtime.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..features import Forward, GetLabels, forward_inputs, labels_of
from ..onnx_inference import onnx_accuracy
from ..whole_files import write_json, writing_whole
from .allocation import BitAllocation
from .run import QuantizedResult, export_quantized, quantize
from .settings import Bits

QUANTIZED_ONNX, BITS_FILE = "quantized.onnx", "bits.json"


def quantize_run(
    model: nn.Module,
    loader: Iterable[Any],
    example_inputs: tuple[Any, ...],
    bits: Bits,
    *,
    folder: str | Path,
    judge: Iterable[Any],
    teacher: nn.Module | None = None,
    training_loader: Iterable[Any] | None = None,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
) -> tuple[QuantizedResult, dict[str, Any]]:
    """Quantize a model, judge its file, and write the file and its bits into `folder`; on any error, neither.

    Args:
        loader: calibration data, training images only.
        judge: batches that the file is judged on, once; `forward` is given a module that runs it.

    Returns:
        the result, and figures for `metrics.json`: `accuracy` (as ONNX Runtime gives it), `size_mb` (on disk),
        `size_mb_predicted`, `size_mb_uniform8`, `bops`, `mean_bits`, `relative_difference` and `kept_float`.

    Raises:
        UserError: as `quantize` and `export_quantized`.
    """
    folder = Path(folder)
    result = quantize(model, loader, example_inputs, bits, training_loader=training_loader, teacher=teacher,
                      get_labels=get_labels, forward=forward)  # fmt: skip
    with writing_whole(folder / QUANTIZED_ONNX) as path:
        written = export_quantized(result, path, example_inputs, checking_inputs(loader, example_inputs))
        figures = {
            "accuracy": onnx_accuracy(path, judge, get_labels=get_labels, forward=forward),
            "size_mb": written.size_mb,
            "size_mb_predicted": result.size_mb,
            "size_mb_uniform8": result.uniform8_size_mb,
            "bops": result.bops,
            "mean_bits": result.allocation.mean_bits(result.weights),
            "relative_difference": written.relative_difference,
            "kept_float": dict(result.kept_float),
        }
        bits_file = {**result.allocation.to_json(), "weights": dict(result.weights), **figures}
        write_json(folder / BITS_FILE, bits_file)
    return result, figures


def read_bits(folder: str | Path) -> tuple[BitAllocation, dict[str, Any]]:
    """The allocation in a run folder, and the rest of its `bits.json`.

    Raises:
        PlanError: there is none, or it is damaged.
    """
    path = Path(folder) / BITS_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"expected {BITS_FILE} of a quantized run at {path}, got {error}") from error
    allocation = BitAllocation.from_json(data)
    return allocation, {key: value for key, value in data.items() if key not in ("version", "bits")}


def checking_inputs(loader: Iterable[Any], example_inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A few real images in place of the example, where the loader's batches have its form."""
    first = next(iter(loader), None)
    inputs = first[0] if isinstance(first, (tuple, list)) and first else None
    images = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    if len(images) == len(example_inputs) and all(
        isinstance(x, torch.Tensor) and isinstance(e, torch.Tensor) and x.shape[1:] == e.shape[1:]
        for x, e in zip(images, example_inputs, strict=True)
    ):
        return tuple(x[:8] for x in images)  # pyright: ignore[reportOptionalSubscript]
    return example_inputs
