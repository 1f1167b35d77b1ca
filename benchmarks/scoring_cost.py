"""B5: what scoring costs. ResNet-50 at 224², 128 images a batch, all convolutions, against one plain forward pass.

    python benchmarks/scoring_cost.py [--quick] [--data DIR] [--images 128] [--size 224] [--threads 1] [--json OUT]
    python benchmarks/scoring_cost.py --device cuda [--json OUT]

Contenders: DI as it ships (Gram matrices of large maps from drawn columns), DI exact, DI with 1,000 classes; the mask
gradient of DI by autograd through an explicit inverse; torch-pruning's Taylor (forward and backward, in batches of 32,
which spares its memory) and its Hessian (one backward an image, timed on some and scaled). Each runs in a process of
its own and alternates there with plain forward passes, so that ratios are of neighbours in time; the figures are
medians over rounds of CPU time and of peak memory above model and inputs.

`--data DIR` (train.npz of CIFAR-10) adds the rank correlation of the shipped scores with the exact ones on real images,
enlarged, for this network with random weights and, if it is installed, EfficientNet-Lite0 with ImageNet weights.
Weights are random otherwise: this is about cost. The time of a search is measured on a made-up latency table.
On a GPU the contenders' times and memory alone are measured, in one process, by its own clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import scoring_on_gpu
import torch
from scoring_contenders import (
    CONTENDERS,
    MICRO_BATCH,
    contender,
    conv_points,
    efficientnet_lite0,
    labels_for,
    resnet50,
    run_forward,
)
from torch import Tensor, nn

from diplugin.costs import Budget
from diplugin.costs.latency import LatencyCost, timed_layers
from diplugin.discriminant import EXACT, Sketch
from diplugin.features import Observation, ScoreProfile, observing, score_points
from diplugin.latency.grid import group_grids, layer_keys
from diplugin.network import trace_network
from diplugin.rank_correlation import rank_correlation
from diplugin.search import FixedScores, greedy_search
from diplugin.tables import Alignment, Entry, LatencyTable, Setting
from diplugin.taps import TapPoint


def child(args: argparse.Namespace) -> None:
    """Run one contender and print its seconds and its peak memory."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    model = resnet50()
    x = torch.randn(args.images, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    work = contender(args.child, model, x, args.size)
    contender(args.child, model, x[:8], args.size)()  # libraries load and allocate on first use
    base = resident_mb()
    cpu, wall = time.process_time(), time.perf_counter()
    times = work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    beside = plain_seconds(model, x)
    if args.again:  # the machine's mood may have changed: work once more, between two forward passes
        started = time.process_time()
        work()
        cpu = (cpu + time.process_time() - started) / 2
        beside = (beside + plain_seconds(model, x)) / 2
    found = {"cpu_s": cpu * times, "wall_s": wall * times, "peak_mb": max(0.0, peak - base)}
    print(json.dumps(found | {"time_ratio": cpu * times / beside}))


def plain_seconds(model: nn.Module, x: Tensor) -> float:
    """CPU seconds of one forward pass."""
    started = time.process_time()
    run_forward(model, x)
    return time.process_time() - started


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    again = ["--again"] if name.startswith(("forward", "DI")) else []
    command = [sys.executable, __file__, "--child", name, "--images", str(args.images), "--size", str(args.size),
               "--threads", str(args.threads), *again]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return json.loads(out.splitlines()[-1])


def growth(args: argparse.Namespace) -> dict[str, float]:
    """Scoring time alone, by images and by layers, each relative to what linear growth would give."""
    torch.set_num_threads(args.threads)
    model = resnet50()
    points = conv_points(model, args.size)
    images = max(16, args.images // 4)
    x = torch.randn(4 * images, 3, args.size, args.size)

    def seconds(batches: int, tapped: tuple[TapPoint, ...]) -> float:
        profile = ScoreProfile()
        loader = [(x[i * images : (i + 1) * images], labels_for(images, 10)) for i in range(batches)]
        score_points(model, loader, tapped, Observation(chunk_size=images), profile=profile)
        return profile.scoring_seconds

    seconds(1, points)
    one, four, half = (statistics.median(seconds(n, p) for _ in range(3))
                       for n, p in ((1, points), (4, points), (1, points[::2])))  # fmt: skip
    rest = statistics.median(seconds(1, points[1::2]) for _ in range(3))
    return {"images x4 over linear": four / (4 * one), "all layers over the sum of two halves": one / (half + rest)}


def search_seconds(size: int) -> dict[str, float]:
    """CPU seconds of a search to half the latency, on a made-up table with steps of 8 channels and random scores."""
    trace = trace_network(resnet50(), (torch.randn(1, 3, size, size),))
    groups = trace.prunable
    alignment = Alignment(8, 8)
    grid = group_grids(trace, alignment)
    keys = sorted({key for layer in timed_layers(trace) for key in layer_keys(layer, grid, trace.base_widths)})
    rows = tuple(Entry(key, key.macs / 20e6 + 0.01, 1.0, 1.0, 0.0) for key in keys)
    setting = Setting("onnxruntime", "1.0", "CPUExecutionProvider", "all", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not calibrated
        cost = LatencyCost(trace, LatencyTable("made-up", "none", setting, rows, (), alignment, 0.1, None))
    generator = torch.Generator().manual_seed(0)
    scores = {g.name: torch.rand(g.channels, generator=generator, dtype=torch.float64) for g in groups}
    started = time.process_time()
    plan = greedy_search(trace, FixedScores(groups, scores), [cost], [Budget("latency_ms", fraction=0.5)])
    seconds = time.process_time() - started
    found = plan.costs["latency_ms"]
    return {"seconds": seconds, "groups": len(groups), "entries": len(rows), "reached": found.predicted / found.base}


def correlation(model: nn.Module, x: Tensor, labels: Tensor, points: tuple[TapPoint, ...]) -> dict[str, float]:
    """Shipped scores against exact ones in the same pass: rank correlation inside layers and over all channels."""
    found: dict[str, Any] = {}
    for name, sketch in (("exact", EXACT), ("shipped", Sketch())):
        found[name] = score_points(model, [(x, labels)], points, Observation(chunk_size=len(x), sketch=sketch))
    pairs = [(found["exact"][p].scores, found["shipped"][p].scores) for p in points if p in found["exact"]]
    inside = [rank_correlation(a, b) for a, b in pairs]
    exact, shipped = (torch.cat(side) for side in zip(*pairs, strict=True))
    return {"least": min(inside), "median": statistics.median(inside), "all channels": rank_correlation(exact, shipped)}


def correlations(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """On real images, enlarged."""
    import numpy as np

    with np.load(args.data / "train.npz", allow_pickle=False) as file:
        pixels, labels = torch.tensor(file["x"][: args.images]), torch.tensor(file["y"][: args.images])
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
    x = nn.functional.interpolate(x, size=(args.size, args.size), mode="bilinear", align_corners=False)
    model = resnet50().train()
    with torch.no_grad():
        model(x[:32])  # statistics of BatchNorm, so that random weights keep their scale
    rows = {"ResNet-50, random weights": correlation(model.eval(), x, labels, conv_points(model, args.size))}
    rows["the same, 1000 logits as targets"] = correlation(model, x, _logits(model, x), conv_points(model, args.size))
    try:
        lite = efficientnet_lite0()
    except ImportError:
        return rows
    points = conv_points(lite, args.size)
    rows["EfficientNet-Lite0, ImageNet weights"] = correlation(lite, x, labels, points)
    rows["the same, its 1000 logits as targets"] = correlation(lite, x, _logits(lite, x), points)
    return rows


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), observing(model, ()):
        return torch.cat([model(part) for part in x.split(MICRO_BATCH)])


def measure_all(names: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians over rounds, the contenders interleaved; always with the forward pass, which they are compared with."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in dict.fromkeys(("forward", *names))}
    for turn in range(args.rounds):
        for name, found in seen.items():
            if turn and name == "Hessian":
                continue
            found.append(measure(name, args))
            print(f"round {turn + 1}: {name} {found[-1]}", file=sys.stderr)
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in seen.items()
    }
    base = max(1.0, medians["forward"]["peak_mb"])
    return [{"name": name, **found, "memory_ratio": found["peak_mb"] / base} for name, found in medians.items()]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'contender':24s} {'seconds':>8s} {'x forward':>10s} {'peak MB':>9s} {'x forward':>10s}"]
    lines += [f"{r['name']:24s} {r.get('cpu_s', r['wall_s']):8.3f} "
              f"{r['time_ratio']:10.2f} {r['peak_mb']:9.0f} {r['memory_ratio']:10.2f}"
              for r in rows]  # fmt: skip
    return "\n".join(lines)


def targets_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    """B5's targets, and whether they are met; on a GPU those of its rows alone."""
    rows = record["rows"]
    ratios = {row["name"]: row["time_ratio"] for row in rows}
    memory = {row["name"]: row["memory_ratio"] for row in rows}["DI"]
    place = 1 + sum(ratios[name] < ratios["DI"] for name in ("Taylor", "Hessian", "DI autograd"))
    gain = (ratios["DI autograd"] - 1) / max(1e-9, ratios["DI"] - 1)
    classes, exact = (ratios[f"{name} 1000 classes"] / ratios[name] for name in ("DI", "DI exact"))
    listed = [
        ("time of DI / forward", "<= 1.3", ratios["DI"], ratios["DI"] <= 1.3),
        ("memory of DI / forward", "<= 1.2", memory, memory <= 1.2),
        ("place among data-driven criteria", "1", place, place == 1),
        ("scoring alone, autograd and inverse / DI", ">= 10", gain, gain >= 10),
        ("1000 classes / 10, as shipped", "<= 1.1", classes, classes <= 1.1),
        ("1000 classes / 10, exact", "<= 1.3", exact, exact <= 1.3),
    ]
    if "search" in record:
        search = record["search"]["seconds"]
        listed.append(("search to half the latency, CPU seconds", "<= 10", search, search <= 10))
    listed += [(name, "<= 1.2", value, value <= 1.2) for name, value in record.get("growth", {}).items()]
    listed += [(f"rank correlation with exact: {name}, least layer", ">= .99", value["least"], value["least"] >= 0.99)
               for name, value in record.get("correlations", {}).items()]  # fmt: skip
    return [{"name": n, "target": t, "value": round(float(v), 4), "met": bool(m)} for n, t, v, m in listed]


def main() -> None:
    parser = argparse.ArgumentParser(description="B5: the cost of scoring")
    parser.add_argument("--quick", action="store_true", help="16 images at 96 pixels, one round")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="these beside the forward pass, nothing else")
    parser.add_argument("--data", type=Path, help="folder with train.npz, for the rank correlations")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.images, args.size, args.rounds = 16, 96, 1
    if args.child:
        child(args)
        return
    names, on_cpu = args.only or CONTENDERS, args.device == "cpu"
    if on_cpu:
        rows, where = measure_all(names, args), f"{args.threads} thread(s)"
    else:
        rows = scoring_on_gpu.measure_all(names, args.images, args.size, args.rounds, args.device)
        where = torch.cuda.get_device_name(args.device)
    print(f"ResNet-50, {args.images} images at {args.size} x {args.size}, {where}\n{table(rows)}")
    settings = {"images": args.images, "size": args.size, "device": where, "rounds": args.rounds,
                "torch": torch.__version__}  # fmt: skip
    record: dict[str, Any] = {"settings": settings, "rows": rows}
    if on_cpu and not args.only:
        record |= {"growth": growth(args), "search": search_seconds(args.size)}
        record["correlations"] = correlations(args) if args.data else {}
    if not args.only:
        record["targets"] = targets_of(record)
        for target in record["targets"]:
            verdict = "met" if target["met"] else "NOT met"
            print(f"{target['name']:80s} {target['target']:>7s} {target['value']:9.4f} {verdict}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1, allow_nan=False))


if __name__ == "__main__":
    main()
