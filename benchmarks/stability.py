"""How many images does DI need? Rank correlation of scores against sample count and seed, and the stopping rule's word.

    python benchmarks/stability.py --data DIR --weights DIR [--images 16000] [--quick] [--json OUT] [--plot OUT]

ResNet-20 on CIFAR-10 (DIR/train.npz; DIR/cifar10_resnet20.safetensors), training images only. Scores of disjoint chunks
of 250 images are computed once. One half of the chunks is the reference; from the other half, `n` chunks in each of
several random orders stand for samples of 250 n images. For every n: rank correlation with the reference inside layers
(weighted by channels) and over all channels, the share of channels on which both agree when every layer keeps its
better half, and what the stopping rule, which sees the sample alone, takes its reliability to be. Then: where
`score --until-stable R` would stop, and how well that sample correlates with as many fresh images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import network
from torch import Tensor

from diplugin.discriminant import ChunkScores
from diplugin.features import CHUNK_SIZE, UntilStable, reliability, score_points
from diplugin.groups import trace_groups
from diplugin.rank_correlation import rank_correlation
from diplugin.sources import load_data
from diplugin.taps import AfterActivation, TapPoint, points_of

Chunk = dict[TapPoint, ChunkScores]
COUNTS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
TARGETS = (0.9, 0.95, 0.98, 0.99)


def chunk_scores_of(args: argparse.Namespace) -> list[Chunk]:
    """Scores of every chunk of the first images of the training data, in a seeded random order."""
    model = network("resnet20", args.weights)
    dataset: Any = load_data(f"cifar10:{args.data}").train.dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: args.images]
    groups = [g for g in trace_groups(model, (torch.randn(1, 3, 32, 32),)) if g.prunable]
    points = points_of(groups, AfterActivation())
    found = []
    for ids in order.split(CHUNK_SIZE):
        items = dataset.__getitems__(ids.tolist())
        batch = torch.stack([x for x, _ in items]), torch.stack([y for _, y in items])
        found.append(score_points(model, [batch], points))
        print(f"{len(found) * CHUNK_SIZE} images", end="\r", file=sys.stderr)
    return found


def mean_scores(chunks: Sequence[Chunk]) -> dict[TapPoint, Tensor]:
    return {point: torch.stack([chunk[point].scores for chunk in chunks]).mean(0) for point in chunks[0]}


def agreement(a: dict[TapPoint, Tensor], b: dict[TapPoint, Tensor]) -> dict[str, float]:
    """Inside layers, over all channels, and on the better half of every layer."""
    channels = sum(len(scores) for scores in a.values())
    inside = sum(len(a[p]) * rank_correlation(a[p], b[p]) for p in a) / channels
    same = sum(len(_better_half(a[p]) & _better_half(b[p])) for p in a) / sum(len(_better_half(a[p])) for p in a)
    return {"inside": inside, "all": rank_correlation(torch.cat(list(a.values())), torch.cat(list(b.values()))),
            "same_half": same}  # fmt: skip


def _better_half(scores: Tensor) -> set[int]:
    return set(scores.argsort(descending=True)[: len(scores) // 2].tolist())


def by_count(sample: Sequence[Chunk], reference: dict[TapPoint, Tensor], seeds: int) -> list[dict[str, float]]:
    rows = []
    for count in COUNTS:
        if count > len(sample):
            break
        runs = []
        for seed in range(seeds):
            drawn = [sample[i] for i in np.random.default_rng(seed).permutation(len(sample))[:count]]
            runs.append(agreement(mean_scores(drawn), reference) | {"rule": reliability(drawn)})
        row: dict[str, float] = {"images": count * CHUNK_SIZE}
        for key in runs[0]:
            values = [run[key] for run in runs]
            row |= {key: statistics.mean(values), f"{key}_least": min(values)}
        rows.append(row)
    return rows


def by_target(sample: Sequence[Chunk], others: Sequence[Chunk], seeds: int) -> list[dict[str, Any]]:
    """Where the rule stops, and how the sample then correlates, inside layers, with as many fresh images."""
    rows = []
    for target in TARGETS:
        rule, images, truth = UntilStable(target), [], []
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(sample))
            used = next((n for n in range(1, len(order)) if rule.reached([sample[i] for i in order[:n]])), None)
            if used is None or used > len(others):
                continue
            fresh = [others[i] for i in np.random.default_rng(1000 + seed).permutation(len(others))[:used]]
            images.append(used * CHUNK_SIZE)
            truth.append(agreement(mean_scores([sample[i] for i in order[:used]]), mean_scores(fresh))["inside"])
        rows.append({
            "target": target, "stopped": len(images), "of": seeds,
            "images": statistics.median(images) if images else None,
            "correlation": statistics.mean(truth) if truth else None,
        })  # fmt: skip
    return rows


def plot(rows: list[dict[str, float]], stops: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    images = [row["images"] for row in rows]
    for key, label, colour in (("all", "all channels", "#2471a3"), ("inside", "inside layers", "#c0392b"),
                               ("same_half", "better half agreed on", "#1e8449")):  # fmt: skip
        means, least = ([row[name] for row in rows] for name in (key, f"{key}_least"))
        axis.plot(images, means, "o-", ms=4, color=colour, label=label)
        axis.fill_between(images, least, means, color=colour, alpha=0.12)
    axis.set(xscale="log", xlabel="images scored", ylabel="agreement with other images",
             title="How many images DI needs (ResNet-20, CIFAR-10)")  # fmt: skip
    for place in sorted({stop["images"] for stop in stops if stop["images"]}):
        names = ", ".join(f"{stop['target']}" for stop in stops if stop["images"] == place)
        axis.axvline(place, color="#7f8c8d", lw=0.8, ls=":")
        axis.text(place, 0.02, f" --until-stable {names}", rotation=90, fontsize=7, va="bottom", ha="right",
                  color="#7f8c8d", transform=axis.get_xaxis_transform())  # fmt: skip
    axis.set_xticks(images, [f"{int(n):,}" for n in images])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="how many images DI needs")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=16000)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="4,000 images, 5 seeds")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.images, args.seeds = 4000, 5
    chunks = chunk_scores_of(args)
    half = len(chunks) // 2
    sample, others = chunks[:half], chunks[half:]
    rows = by_count(sample, mean_scores(others), args.seeds)
    stops = by_target(sample, others, args.seeds)
    print(f"\nagreement with {len(others) * CHUNK_SIZE} other images, mean (least) of {args.seeds} seeds")
    print(f"{'images':>7s} {'inside layers':>16s} {'all channels':>16s} {'better half':>16s} {'the rule says':>14s}")
    for row in rows:
        cells = " ".join(f"{row[k]:7.3f} ({row[k + '_least']:.3f})" for k in ("inside", "all", "same_half"))
        print(f"{row['images']:7.0f} {cells} {row['rule']:14.3f}")
    for stop in stops:
        where = "never within the sample" if stop["images"] is None else f"{stop['images']:.0f} images (median)"
        truth = "" if stop["correlation"] is None else f"; correlates by {stop['correlation']:.3f} with as many others"
        print(f"--until-stable {stop['target']}: {where}, {stop['stopped']} of {stop['of']} seeds{truth}")
    targets = [
        {"name": f"--until-stable {s['target']} keeps its word", "target": f">= {s['target']} - .02",
         "value": s["correlation"], "met": s["correlation"] >= s["target"] - 0.02}
        for s in stops if s["correlation"] is not None
    ]  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "stops": stops, "targets": targets}, indent=1))
    if args.plot:
        plot(rows, stops, args.plot)


if __name__ == "__main__":
    main()
