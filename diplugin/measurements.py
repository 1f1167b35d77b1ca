"""What a run measures: accuracy, costs counted on the network itself, the ONNX file's size and time, and verdicts.

Predictions come from a plan; everything here is looked up on the network that came out, so that the two can stand
side by side in `metrics.json` and the report.
"""

from __future__ import annotations

import math
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import nn

from .accuracy import accuracy
from .costs import Budget, CostModel, PeakActivationMemory, macs, params
from .features import Forward, GetLabels
from .network import trace_network
from .plan import PruningPlan
from .tables import LatencyTable
from .team import current_team

_PACKAGES = ("diplugin", "torch", "torch-pruning", "onnx", "onnxruntime", "numpy", "scikit-learn")


@dataclass(frozen=True)
class Measure:
    """How the networks of one run are measured.

    Attributes:
        judge: batches that accuracy is reported on.
        inputs: example inputs at batch 1.
        table: of the target device; where it is another device's, nothing is timed here.
        unpruned: where the unpruned network's ONNX file stays while the run lasts, to be timed beside the pruned one.
    """

    judge: Iterable[Any]
    inputs: tuple[Any, ...]
    table: LatencyTable | None
    get_labels: GetLabels
    forward: Forward
    unpruned: Path

    def base(self, model: nn.Module, costs: Sequence[CostModel]) -> dict[str, Any]:
        """Figures of the unpruned network."""
        figures: dict[str, Any] = {"accuracy": self.accuracy(model)}
        figures.update({"latency_ms_predicted" if c.name == "latency_ms" else c.name: c.base for c in costs})
        figures.update(self.exported(model, self.unpruned))
        return {**figures, "latency_ms_measured": self.timed(self.unpruned)[0]}

    def pruned(self, model: nn.Module, plan: PruningPlan) -> dict[str, Any]:
        """Figures of a cut network; MACs, parameters and memory counted on the network itself."""
        trace = trace_network(model, self.inputs, verify=False)
        counted = {c.name: c.base for c in (macs(trace), params(trace), PeakActivationMemory(trace))}
        latency = plan.costs.get("latency_ms")
        return {"accuracy": self.accuracy(model), **counted,
                "latency_ms_predicted": latency.predicted if latency else None,
                "latency_ms_measured": None, "size_mb": None}  # fmt: skip

    def accuracy(self, model: nn.Module, data: Iterable[Any] | None = None) -> float:
        """Fraction right on the judge's data, or on other data of the same form."""
        return accuracy(model, self.judge if data is None else data, get_labels=self.get_labels, forward=self.forward)

    def exported(self, model: nn.Module, path: Path) -> dict[str, Any]:
        """Write the ONNX file; its size, and how near it comes to torch. Of many processes the first one writes it."""
        from .export import export_onnx

        def work() -> dict[str, Any]:
            check = export_onnx(model, self.inputs, path)
            return {"size_mb": check.size_mb, "onnx_max_abs_difference": check.max_abs_difference}

        return current_team().done_by_first(work)

    def timed(self, *paths: Path) -> list[float | None]:
        """Times of ONNX files on this machine, in ms, as 8-bit ones under an 8-bit table; None under another device's.

        The files run in turns: a machine that others use too is not as fast at the end of a run as at its start, and in
        turns all of them meet the same minute. Of many processes the first one times them while the others wait: a
        clock wants a machine to itself.
        """

        def work() -> list[float | None]:
            if self.table is not None and not self._is_local():
                return [None] * len(paths)
            from .latency import measure_side_by_side

            threads, dtype = (self.table.setting.threads, self.table.dtype) if self.table else (1, "float32")
            return [timing.latency_ms for timing in measure_side_by_side(paths, threads=threads, dtype=dtype)]

        return current_team().done_by_first(work)

    def milliseconds(self, model: nn.Module) -> float | None:
        """The network's time as ONNX on this machine; None where the table is another device's."""
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.onnx"
            self.exported(model, path)
            return self.timed(path)[0]

    @property
    def local(self) -> bool:
        """Whether the table was measured on this very machine (the first process', if there are several)."""
        return current_team().done_by_first(self._is_local)

    def _is_local(self) -> bool:
        if self.table is None or self.table.origin != "measured":
            return False
        from .latency.local import is_this_machine

        return is_this_machine(self.table)


def verdict(budget: Budget, base: Mapping[str, Any], plan: PruningPlan, final: Mapping[str, Any]) -> dict[str, Any]:
    """One line of `metrics["budgets"]`: asked, predicted, measured, and whether it is met as measured.

    A fraction of the latency is one of the unpruned network's latency as measured, where both networks were.
    """
    cost = plan.costs[budget.cost]
    asked = budget.limit if budget.limit is not None else float(budget.fraction or 0) * cost.base
    if budget.fraction is not None and budget.cost == "latency_ms" and base.get("latency_ms_measured"):
        asked = budget.fraction * base["latency_ms_measured"]
    measured = final.get("latency_ms_measured" if budget.cost == "latency_ms" else budget.cost)
    met = (measured if measured is not None else cost.predicted) <= asked * (1 + 1e-9)
    return {"cost": budget.cost, "asked": asked, "predicted": cost.predicted, "measured": measured, "met": met}


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def finite(data: Any) -> Any:
    """JSON has no NaN: a figure that is not finite becomes null."""
    if isinstance(data, dict):
        return {k: finite(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
