"""Prices of the per-operator latency model, in ms a unit; written by benchmarks/fit_estimates.py."""

from __future__ import annotations

PRICES: dict[str, dict[str, float]] = {
    "jetson-nano-cpu": {
        "dense_macs": 1.24622e-07,
        "point_macs": 1.23348e-07,
        "depthwise_macs": 1.98157e-06,
        "grouped_macs": 1.33259e-07,
        "linear_macs": 1.31e-07,
        "dense_bytes": 1.34595e-06,
        "point_bytes": 2.80928e-07,
        "grouped_bytes": 1.63087e-06,
        "weight_bytes": 2.03555e-07,
        "calls": 0.0744959,
        "depthwise_calls": 0.146151,
        "soft_bytes": 1.02561e-06,
        "soft_calls": 0.0415131,
        "plain_bytes": 9.65049e-07,
    },
    "jetson-nano-gpu": {
        "dense_macs": 8.12566e-09,
        "point_macs": 1.48579e-08,
        "depthwise_macs": 1.81238e-07,
        "grouped_macs": 1.30301e-09,
        "linear_macs": 5.86963e-09,
        "dense_bytes": 4.94732e-07,
        "point_bytes": 3.11867e-07,
        "depthwise_bytes": 4.37935e-07,
        "grouped_bytes": 1.74286e-06,
        "weight_bytes": 1.63574e-07,
        "calls": 0.0716872,
        "soft_bytes": 3.04981e-07,
        "soft_calls": 0.0634237,
        "plain_bytes": 1.1293e-07,
    },
    "raspberry-pi-4": {
        "dense_macs": 4.39311e-07,
        "point_macs": 4.34819e-07,
        "depthwise_macs": 6.98532e-06,
        "grouped_macs": 4.69757e-07,
        "linear_macs": 4.61795e-07,
        "point_bytes": 6.82945e-07,
        "depthwise_bytes": 6.82945e-07,
        "grouped_bytes": 6.82945e-07,
        "pool_bytes": 2.65697e-06,
    },
}

# Held-out errors as fractions: `low` and `high` bound four measurements in five.
ERRORS: dict[str, dict[str, float]] = {
    "jetson-nano-cpu": {
        "median": 0.03473,
        "mape": 0.05117,
        "nets": 253.0,
        "rho": 0.9969,
        "low": 0.05958,
        "high": 0.1054,
    },
    "jetson-nano-gpu": {"median": 0.1931, "mape": 0.2162, "nets": 253.0, "rho": 0.9486, "low": 0.1876, "high": 0.7317},
    "raspberry-pi-4": {"median": 0.06475, "mape": 0.09952, "nets": 591.0, "rho": 0.9596, "low": 0.1262, "high": 0.2283},
}

SOURCES: dict[str, str] = {
    "jetson-nano-cpu": "253 timm CNNs, 90 families, ONNX Runtime",
    "jetson-nano-gpu": "253 timm CNNs, 90 families, ONNX Runtime",
    "raspberry-pi-4": "591 NAS-Bench-201 cells, TensorFlow Lite",
}
