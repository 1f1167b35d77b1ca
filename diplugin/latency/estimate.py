"""Latency of a device that is not at hand: prices an operator, fitted to real measurements of whole models.

No trustworthy per-layer table of a Jetson Nano or a Raspberry Pi 4 is public, whole-model times are.
`benchmarks/fit_estimates.py` fits one non-negative price a feature to them; only prices and held-out errors are kept.
What comes out is *estimated*: it knows no staircase, is labelled so wherever it is shown, and is never called measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..costs.latency import LayerSides, timed_layers
from ..errors import TableError
from ..network import LayerSpec, NetworkTrace
from ..tables import Alignment, Entry, LatencyTable, OpKey, Setting
from .grid import group_grids, layer_keys
from .operators import layer_features
from .plan import BY_EIGHT
from .prices import ERRORS, PRICES, SOURCES

_SETTINGS = {
    "jetson-nano-cpu": ("Jetson Nano, CPU", Setting("onnxruntime", "", "CPUExecutionProvider", "all", 4)),
    "jetson-nano-gpu": ("Jetson Nano, GPU", Setting("onnxruntime", "", "CUDAExecutionProvider", "all", 1)),
    "raspberry-pi-4": ("Raspberry Pi 4", Setting("tflite", "", "CPU", "", 1)),
}
_LEAST_MS = 1e-6


@dataclass(frozen=True)
class Estimate:
    """An estimated latency in ms; four measurements in five of nets left out of the fit lay from `low` to `high`."""

    device: str
    latency_ms: float
    low: float
    high: float

    @property
    def text(self) -> str:
        error = ERRORS[self.device]
        return (
            f"{self.latency_ms:.4g} ms estimated on {_SETTINGS[self.device][0]} ({self.low:.4g} to {self.high:.4g}); "
            f"held-out median error {error['median']:.1%}, rank correlation {error['rho']:.3f}, "
            f"fitted to {SOURCES[self.device]}; an estimate, not a measurement"
        )


def devices() -> tuple[str, ...]:
    """Devices that can be estimated."""
    return tuple(PRICES)


def _prices(device: str) -> dict[str, float]:
    if device not in PRICES:
        raise TableError(f"expected a device among {', '.join(PRICES)}, got {device!r}")
    return PRICES[device]


def layer_ms(prices: dict[str, float], layer: LayerSpec) -> float:
    """Estimated milliseconds of one layer call."""
    return sum(prices.get(name, 0.0) * value for name, value in layer_features(layer).items())


def estimate(device: str, trace: NetworkTrace) -> Estimate:
    """Estimated latency of a whole network.

    Raises:
        TableError: an unknown device.
    """
    prices, error = _prices(device), ERRORS[device]
    total = sum(layer_ms(prices, layer) for layer in trace.layers)
    return Estimate(device, total, total * (1 - error["low"]), total * (1 + error["high"]))


def key_layer(key: OpKey) -> LayerSpec:
    """A layer call that has this key."""
    if key.op == "linear":
        rows = () if key.size == (1,) else key.size
        return LayerSpec("", "linear", key.cin, key.cout, (key.batch, *rows, key.cin), (key.batch, *rows, key.cout),
                         activation=key.activation or None)  # fmt: skip
    shapes = (key.batch, key.cin, *key.size), (key.batch, key.cout, *key.output_size)
    return LayerSpec("", key.op, key.cin, key.cout, *shapes, key.kernel, key.stride, key.padding, key.dilation,
                     key.groups, activation=key.activation or None)  # fmt: skip


def estimated_table(device: str, trace: NetworkTrace, *, points: int = 8) -> LatencyTable:
    """A table of estimates for everything that a search on this network can ask for.

    Raises:
        TableError: an unknown device.
    """
    prices, error = _prices(device), ERRORS[device]
    grid = group_grids(trace, BY_EIGHT, points)
    layers: list[LayerSides] = timed_layers(trace)
    keys = dict.fromkeys(key for layer in layers for key in layer_keys(layer, grid, trace.base_widths))
    entries = []
    for key in keys:
        ms = max(_LEAST_MS, layer_ms(prices, key_layer(key)))
        entries.append(Entry(key, ms, 0.0, 0.0, 0.0))
    rest = sum(layer_ms(prices, layer) for layer in trace.layers if layer.op == "norm")
    words, setting = _SETTINGS[device]
    return LatencyTable(
        f"{device}-estimated", words, setting, tuple(entries), alignment=Alignment(1, 1), overhead_ms=rest,
        origin="estimated", error_band=(error["low"], error["high"]),
        provenance={"fitted_to": SOURCES[device], "held_out_median": error["median"], "held_out_rho": error["rho"]},
    )  # fmt: skip
