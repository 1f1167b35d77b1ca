"""A measurement of a run's final network, written into the run beside the prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..run_folder import METRICS, read_json
from ..whole_files import write_json
from .onnx_timing import OnnxTiming

_LAST = ("recovered", "pruned")  # model.onnx is the float network, whatever was quantized after it


def note_measurement(folder: str | Path, timing: OnnxTiming, place: str) -> dict[str, Any]:
    """Put a timing of a run's `model.onnx` into its metrics; returns them.

    Raises:
        PlanError: the folder holds no whole run.
    """
    path = Path(folder) / METRICS
    metrics = read_json(path)
    stage = next((name for name in _LAST if name in metrics), None)
    if stage is None:
        raise PlanError(f"expected a whole run in {folder}, its {METRICS} tells of no pruned network")
    metrics[stage]["latency_ms_measured"] = timing.latency_ms
    metrics[stage]["peak_memory_mb_measured"] = timing.peak_memory_mb
    metrics["measured_on"] = place
    for budget in metrics.get("budgets", []):
        if budget["cost"] == "latency_ms":
            budget["measured"] = timing.latency_ms
            budget["met"] = timing.latency_ms <= budget["asked"] * (1 + 1e-9)
    write_json(path, metrics)
    return metrics
