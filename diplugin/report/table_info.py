"""What a run keeps of its latency table: where it comes from and how far it can be trusted, without its entries."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..tables import LatencyTable


def table_info(table: LatencyTable) -> dict[str, Any]:
    """A table as `metrics.json` records it under `latency_table`: plain data, no entries.

    `nets` holds the networks of the calibration, predicted beside measured (ms), for the report's picture.
    """
    fit = table.calibration
    return {
        "name": table.name,
        "device": table.device,
        "profiled_on": table.provenance.get("device"),
        "setting": table.setting.text,
        "threads": table.setting.threads,
        "origin": table.origin,
        "emulated": table.emulated,
        "dtype": table.dtype,
        "entries": len(table.entries),
        "alignment": f"multiples of {table.alignment.step}" if table.alignment.step > 1 else "none measured",
        "calibration": None if fit is None else asdict(fit),
        "error_band": None if table.error_band is None else list(table.error_band),
        "nets": [
            {"predicted_ms": fit.predict(n.sum_ms, n.weights_mb), "measured_ms": n.measured_ms}
            for n in table.nets
            if fit
        ],
        "profile_plan_sha256": table.plan_sha256,
    }
