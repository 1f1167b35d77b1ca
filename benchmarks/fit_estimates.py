"""Refit the latency estimates of devices that are not at hand from measurements of whole models.

DATA holds `jetson_nano_cpu_onnxruntime.csv` and `jetson_nano_gpu_onnxruntime.csv` (timm_model, resolution,
mean_latency_s) and `raspberry_pi4_nasbench201.csv` (index, cell, raspi4_ms). The model is a non-negative sum of
per-operator prices, fitted to relative errors. Held-out errors: for the Nano whole families of architectures are left
out (near relatives in the fit would flatter it), for the Pi random tenths of the cells.

The Pi's cells have no depthwise, grouped or wide layers, so the prices of its arithmetic are the Nano CPU's times one
factor, and only bytes, calls, pooling and additions are its own: one more reason to measure.

    python benchmarks/fit_estimates.py DATA [--write] [--json OUT] [--quick]
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision_models import import_timm

from diplugin.latency.operators import FEATURES, network_features
from diplugin.network import LayerSpec, record_layers
from diplugin.rank_correlation import rank_correlation

ROOT = Path(__file__).resolve().parents[1]

Floats = np.ndarray[Any, np.dtype[np.float64]]
NANO = {"jetson-nano-cpu": "jetson_nano_cpu_onnxruntime.csv", "jetson-nano-gpu": "jetson_nano_gpu_onnxruntime.csv"}
_TRAINED_AS = r"^(tf|gluon|ssl|swsl|legacy|tv|ens_adv|jx|ig|wide|dm)_"


def fit(features: Floats, measured: Floats) -> Floats:
    """Non-negative prices of least squared relative error."""
    from scipy.optimize import nnls

    scale = np.abs(features).max(0) + 1e-12
    prices, _ = nnls(features / scale / measured[:, None], np.ones(len(measured)))
    return prices / scale


def held_out(features: Floats, measured: Floats, folds: Sequence[str]) -> dict[str, float]:
    """Errors of predictions for each fold by prices fitted on the others, and the band that holds 80 % of them."""
    predicted = np.zeros(len(measured))
    names = np.array(folds)
    for name in np.unique(names):
        predicted[names == name] = features[names == name] @ fit(features[names != name], measured[names != name])
    ratio = measured / predicted
    errors = np.abs(predicted / measured - 1)
    low, high = np.quantile(ratio, [0.1, 0.9])
    return {"median": float(np.median(errors)), "mape": float(errors.mean()), "nets": len(measured),
            "rho": rank_correlation(list(predicted), list(measured)),
            "low": float(max(0.0, 1 - low)), "high": float(max(0.0, high - 1))}  # fmt: skip


def family(model: str) -> str:
    """Architecture family of a timm name: `tf_efficientnet_b0.ap_in1k` -> `efficientnet_b`."""
    return re.sub(r"[0-9].*", "", re.sub(_TRAINED_AS, "", model).partition(".")[0])


def timm_layers(names: Sequence[tuple[str, int]]) -> Iterator[list[LayerSpec]]:
    """The layers of each model, traced without weights or arithmetic on torch's meta device."""
    timm = import_timm()
    for name, side in names:
        with torch.device("meta"):
            yield record_layers(timm.create_model(name, pretrained=False).eval(), (torch.randn(1, 3, side, side),))


def cell_edges(cell: str) -> tuple[list[tuple[str, int, int]], bool]:
    """Operations (name, from, to) that run in a NAS-Bench-201 cell, and whether its output depends on its input.

    An operation runs if something on the way to the output reads it, whether or not its own input is zero.
    """
    found = []
    for node, part in enumerate(cell.strip("|").split("|+|"), 1):
        for edge in part.strip("|").split("|"):
            name, _, source = edge.partition("~")
            if name != "none":
                found.append((name, int(source), node))
    reached, read = {0}, {3}
    for _ in range(4):
        reached |= {to for _, source, to in found if source in reached}
        read |= {source for _, source, to in found if to in read}
    return [edge for edge in found if edge[2] in read], 3 in reached


def conv(cin: int, cout: int, kernel: int, side: int) -> LayerSpec:
    return LayerSpec("", "conv", cin, cout, (1, cin, side, side), (1, cout, side, side), (kernel, kernel), (1, 1),
                     (kernel // 2,) * 2, (1, 1), activation="relu")  # fmt: skip


def cell_network(cell: str) -> list[float]:
    """Features of the whole NAS-Bench-201 network around a cell."""
    edges, _ = cell_edges(cell)
    layers, pool, add = [conv(3, 16, 3, 32)], 0.0, 0.0
    for channels, side in ((16, 32), (32, 16), (64, 8)):
        if channels > 16:
            half = channels // 2
            layers += [conv(half, channels, 3, side), conv(channels, channels, 3, side), conv(half, channels, 1, side)]
        pixels = 5 * 4.0 * channels * side**2
        kernels = {"nor_conv_3x3": 3, "nor_conv_1x1": 1}
        layers += [conv(channels, channels, kernels[name], side) for name, *_ in edges if name in kernels] * 5
        pool += 2 * pixels * sum(name == "avg_pool_3x3" for name, *_ in edges)
        add += 3 * pixels * (len(edges) - len({to for *_, to in edges}))
    total = dict(zip(FEATURES, network_features(layers), strict=True))
    return list((total | {"pool_bytes": pool, "add_bytes": add}).values())


def fit_nano(data: Path, limit: int | None) -> dict[str, dict[str, Any]]:
    """Prices and held-out errors of the Nano's CPU and GPU."""
    tables = {name: list(csv.DictReader((data / file).open())) for name, file in NANO.items()}
    models = sorted({(r["timm_model"], int(float(r["resolution"]))) for rows in tables.values() for r in rows})[:limit]
    features = {model: network_features(layers) for model, layers in zip(models, timm_layers(models), strict=True)}
    results = {}
    for name, rows in tables.items():
        known = [r for r in rows if (r["timm_model"], int(float(r["resolution"]))) in features]
        x = np.array([features[r["timm_model"], int(float(r["resolution"]))] for r in known])
        y = np.array([float(r["mean_latency_s"]) * 1e3 for r in known])
        families = [family(r["timm_model"]) for r in known]
        results[name] = {"prices": fit(x, y), "error": held_out(x, y, families),
                         "source": f"{len(known)} timm CNNs, {len(set(families))} families, ONNX Runtime"}  # fmt: skip
    return results


def fit_pi(data: Path, nano: Floats) -> dict[str, Any]:
    """The Pi's prices: the Nano's arithmetic by one factor; bytes, calls, pooling and additions of its own."""
    rows = list(csv.DictReader((data / "raspberry_pi4_nasbench201.csv").open()))
    rows = [row for row in rows if cell_edges(row["cell"])[1]]
    features = np.array([cell_network(row["cell"]) for row in rows])
    y = np.array([float(row["raspi4_ms"]) for row in rows])
    arithmetic = nano * np.array([name.endswith("_macs") for name in FEATURES])
    own = [FEATURES.index(name) for name in ("dense_bytes", "point_bytes", "calls", "pool_bytes", "add_bytes")]
    x = np.concatenate([(features @ arithmetic)[:, None], features[:, own]], 1)
    folds = [str(i) for i in np.random.default_rng(0).permutation(len(y)) % 10]
    found = fit(x, y)
    prices = arithmetic * found[0]
    prices[own] += found[1:]
    for kind in ("depthwise_bytes", "grouped_bytes"):
        prices[FEATURES.index(kind)] = prices[FEATURES.index("point_bytes")]
    return {"prices": prices, "error": held_out(x, y, folds), "factor": float(found[0]),
            "source": f"{len(y)} NAS-Bench-201 cells, TensorFlow Lite"}  # fmt: skip


def written(results: dict[str, dict[str, Any]]) -> str:
    """The module of coefficients."""
    title = '"""Prices of the per-operator latency model, in ms a unit; written by benchmarks/fit_estimates.py."""'
    lines = [title, "", "from __future__ import annotations", "", "PRICES: dict[str, dict[str, float]] = {"]
    for name, result in results.items():
        prices = {f: float(f"{p:.6g}") for f, p in zip(FEATURES, result["prices"], strict=True) if p > 0}
        lines += [f'    "{name}": {{', *(f'        "{f}": {p!r},' for f, p in prices.items()), "    },"]
    lines += ["}", "", "# Held-out errors as fractions: `low` and `high` bound four measurements in five.",
              "ERRORS: dict[str, dict[str, float]] = {"]  # fmt: skip
    for name, result in results.items():
        errors = ", ".join(f'"{k}": {float(f"{v:.4g}")!r}' for k, v in result["error"].items())
        lines.append(f'    "{name}": {{{errors}}},')
    lines += ["}", "", "SOURCES: dict[str, str] = {"]
    lines += [f'    "{name}": "{result["source"]}",' for name, result in results.items()]
    return "\n".join([*lines, "}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description="Refit latency estimates")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--write", action="store_true", help="into diplugin/latency/prices.py")
    parser.add_argument("--quick", action="store_true", help="the first 60 models")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results = fit_nano(args.data, 60 if args.quick else None)
    results["raspberry-pi-4"] = fit_pi(args.data, results["jetson-nano-cpu"]["prices"])
    for name, result in results.items():
        error = result["error"]
        print(f"{name:16s} {result['source']}: held-out median {error['median']:.1%}, MAPE {error['mape']:.1%}, "
              f"rho {error['rho']:.3f}, 80 % within -{error['low']:.0%} +{error['high']:.0%}")  # fmt: skip
    median, rho = (results["jetson-nano-cpu"]["error"][key] for key in ("median", "rho"))
    targets = [{"name": "Nano CPU, median error", "target": 0.15, "value": median, "met": median <= 0.15},
               {"name": "Nano CPU, rank correlation", "target": 0.95, "value": rho, "met": rho >= 0.95}]  # fmt: skip
    for target in targets:
        print(f"{'met   ' if target['met'] else 'MISSED'} {target['name']}: {target['value']:.4f} ({target['target']})")
    if args.write:
        path = ROOT / "diplugin" / "latency" / "prices.py"
        path.write_text(written(results))
        print(path)
    if args.json:
        rows = [{"device": n, "source": r["source"], **r["error"]} for n, r in results.items()]
        args.json.write_text(json.dumps({"rows": rows, "targets": targets}, indent=1))


if __name__ == "__main__":
    main()
