"""B4: how well a latency table predicts whole pruned nets.

Three families (ResNet-20 at 32², MobileNetV2 at 96², ResNet-18 at 128²). Each is profiled by the tool itself on this
machine, with the unpruned net and sixteen random pruned ones for the calibration. In the same run, among the same
rounds and watched by the same sentinel, more random pruned nets are timed end to end, physically pruned; the
calibration never sees them, and the table's prediction of each is compared with its measurement.

    python benchmarks/latency_prediction.py [--quick] [--threads 1] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import cifar_resnet
from torch import nn
from torchvision_models import import_torchvision

from diplugin.costs.latency import LatencyCost
from diplugin.latency import profile_here
from diplugin.latency.calibration import calibrate, own_cache_mb
from diplugin.network import trace_network
from diplugin.rank_correlation import rank_correlation

CALIBRATING = 16
TARGETS = (("MAPE, all families", "mape", 0.02), ("worst error", "worst", 0.06), ("rank correlation", "rho", 0.995))


def families() -> dict[str, tuple[Any, int]]:
    """Name -> (constructor, resolution)."""
    models = import_torchvision().models
    return {
        "resnet20": (cifar_resnet.resnet20, 32),
        "mobilenet_v2": (models.mobilenet_v2, 96),
        "resnet18": (models.resnet18, 128),
    }


def judge(name: str, build: Any, side: int, held: int, args: argparse.Namespace) -> dict[str, Any]:
    """Profile one family and compare predictions with measurements of the nets that the calibration did not see."""
    torch.manual_seed(0)
    model: nn.Module = build().eval()
    inputs = (torch.randn(1, 3, side, side),)
    trace = trace_network(model, inputs)
    start = time.perf_counter()
    table = profile_here(
        model,
        inputs,
        trace=trace,
        name=name,
        threads=args.threads,
        budget_s=args.seconds,
        nets=CALIBRATING + held,
        journal=args.tables / f"{name}.jsonl" if args.tables else None,
    )
    profiled = time.perf_counter() - start
    seen, unseen = table.nets[: CALIBRATING + 1], table.nets[CALIBRATING + 1 :]
    calibration = calibrate(seen, own_cache_mb(table.setting, table.provenance))
    assert calibration is not None, "enough nets"
    table = replace(table, nets=seen, calibration=calibration)
    if args.tables:
        table.save(args.tables / f"{name}.json")
    pairs = [(calibration.predict(net.sum_ms, net.weights_mb), net.measured_ms) for net in unseen]
    return {
        "family": name, "nets": held, "pairs": pairs, "entries": len(table.entries), "profile_s": profiled,
        "step": table.alignment.step, "plateau": table.alignment.plateau,
        "unpruned_ms": LatencyCost(trace, table).base, "calibration_mape": calibration.mape,
        "unstable": sum(entry.unstable for entry in table.entries) / len(table.entries), **errors(pairs),
    }  # fmt: skip


def errors(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """MAPE, worst error and rank correlation of (predicted, measured)."""
    predicted, measured = np.array(pairs).T
    relative = np.abs(predicted / measured - 1)
    return {"mape": float(relative.mean()), "worst": float(relative.max()),
            "rho": rank_correlation(list(predicted), list(measured))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="B4: latency prediction")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240.0, help="to spend on each family's table")
    parser.add_argument("--nets", type=int, default=14, help="held-out nets a family")
    parser.add_argument("--families", default="resnet20,mobilenet_v2,resnet18")
    parser.add_argument("--tables", type=Path, help="also write the tables into this folder")
    parser.add_argument("--quick", action="store_true", help="ResNet-20 only, 5 nets")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = families()
    names = ["resnet20"] if args.quick else args.families.split(",")
    rows = []
    for name in names:
        row = judge(name, *known[name], 5 if args.quick else args.nets, args)
        print(f"{name:14s} {row['nets']} nets, {row['entries']} entries in {row['profile_s']:.0f} s, steps "
              f"{row['step']}/{row['plateau']}: MAPE {row['mape']:.2%}, worst {row['worst']:.2%}, rho {row['rho']:.4f} "
              f"(calibration says {row['calibration_mape'] or 0:.2%}, unstable {row['unstable']:.1%}), "
              f"load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
        rows.append(row)
    together = errors([pair for row in rows for pair in row["pairs"]])
    targets = [{"name": title, "target": limit, "value": round(together[key], 5),
                "met": together[key] >= limit if key == "rho" else together[key] <= limit}
               for title, key, limit in TARGETS]  # fmt: skip
    for target in targets:
        print(f"{'met   ' if target['met'] else 'MISSED'} {target['name']}: {target['value']} ({target['target']})")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "targets": targets}, indent=1))


if __name__ == "__main__":
    main()
