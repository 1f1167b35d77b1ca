"""Small latency tables for tests, whose every time is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from diplugin.costs.latency import timed_layers
from diplugin.latency.grid import group_grids, layer_keys
from diplugin.network import trace_network
from diplugin.tables import Alignment, Calibration, Entry, LatencyTable, NetTiming, OpKey, Setting

SETTING = Setting("onnxruntime", "1.32.0", "CPUExecutionProvider", "all", 1)


def conv(cin: int, cout: int, **changes: Any) -> OpKey:
    return replace(OpKey("conv", cin, cout, (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8), "relu"), **changes)


def table(*widths: int, **changes: Any) -> LatencyTable:
    """Entries for the product of the widths, each cin * cout microseconds."""
    entries = tuple(
        Entry(conv(i, o), i * o * 1e-3, i * o * 1.1e-3, i * o * 1.2e-3, 0.01) for i in widths for o in widths
    )
    nets = (NetTiming("unpruned", 2.0, 1.9, 2.0, 2.1, 0.004),)
    built = LatencyTable(
        "bench",
        "a device",
        SETTING,
        entries,
        nets,
        Alignment(4, 8),
        0.005,
        Calibration(1.02, 0.1, 12, 0.011, 0.03, 0.99),
        provenance={"governor": "performance", "cpus": 4},
    )
    return replace(built, **changes)


def refilled() -> LatencyTable:
    calibration = Calibration(1.02, 0.1, 12, 0.011, 0.03, 0.99, refill_ms=0.2, cache_mb=2.097152)
    return table(8, nets=(NetTiming("unpruned", 2.0, 1.9, 2.0, 2.1, 0.004, 11.5),), calibration=calibration)


def timed_by_macs(model: nn.Module, inputs: tuple[Tensor, ...], mape: float = 0.01) -> LatencyTable:
    """Of an imaginary device on which every layer of a network takes as long as its MACs, and a microsecond."""
    trace, alignment = trace_network(model, inputs), Alignment(2, 2)
    grid = group_grids(trace, alignment)
    keys = {key for layer in timed_layers(trace) for key in layer_keys(layer, grid, trace.base_widths)}
    entries = tuple(Entry(key, key.macs * 1e-5 + 0.001, 1.0, 1.0, 0.0) for key in sorted(keys))
    return LatencyTable(
        "made-up", "device", SETTING, entries, (), alignment, 0.02, Calibration(1, 0, 12, mape, 0.03, 1)
    )
