"""A measurement of a run's final network, written into the run beside the prediction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..run_folder import METRICS, cut_figures, read_json
from ..whole_files import write_json
from . import device
from .onnx_timing import OnnxTiming

HERE = "here"


def planned_elsewhere(metrics: Mapping[str, Any]) -> str | None:
    """The device whose latency table a run was planned with, in words; None if it is this machine, or had no table."""
    table, here = _table(metrics), device.device_model()
    if not table or table.get("profiled_on") == here:
        return None
    return None if table.get("device") == here[:160] else str(table.get("device"))


def planned_threads(metrics: Mapping[str, Any]) -> int:
    """Threads of the runtime that a run was planned for; 1 where it does not say."""
    threads = _table(metrics).get("threads")
    return threads if isinstance(threads, int) and threads >= 1 else 1


def planned_dtype(metrics: Mapping[str, Any]) -> str:
    """The number type that a run's latency table speaks of: "int8" or "float32"."""
    return "int8" if _table(metrics).get("dtype") == "int8" else "float32"


def note_measurement(folder: str | Path, timing: OnnxTiming, place: str) -> dict[str, Any]:
    """Put a timing of a run's `model.onnx` into its metrics; returns them.

    A budget on another device's latency is not judged by a time taken `HERE`: its verdict stays.

    Raises:
        PlanError: the folder holds no whole run.
    """
    path = Path(folder) / METRICS
    metrics = read_json(path)
    figures, budgets = cut_figures(metrics, Path(folder)), _latency_budgets(metrics, path)
    foreign = place == HERE and planned_elsewhere(metrics) is not None
    figures["latency_ms_measured"] = timing.latency_ms
    figures["peak_memory_mb_measured"] = timing.peak_memory_mb
    metrics["measured_on"] = device.device_model() if foreign else place
    for budget in () if foreign else budgets:
        budget["measured"] = timing.latency_ms
        budget["met"] = timing.latency_ms <= budget["asked"] * (1 + 1e-9)
    write_json(path, metrics)
    return metrics


def _table(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    table = metrics.get("latency_table")
    return table if isinstance(table, Mapping) else {}


def _latency_budgets(metrics: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    budgets = metrics.get("budgets") or []
    if not isinstance(budgets, list) or not all(
        isinstance(b, dict) and isinstance(b.get("cost"), str) for b in budgets
    ):
        raise PlanError(f"expected budgets with their costs in {path}, got {budgets!r:.80}")
    found = [b for b in budgets if b["cost"] == "latency_ms"]
    odd = [b for b in found if isinstance(b.get("asked"), bool) or not isinstance(b.get("asked"), (int, float))]
    if odd:
        raise PlanError(f"expected a latency budget with what was 'asked' in {path}, got {odd[0]!r:.80}")
    return found
