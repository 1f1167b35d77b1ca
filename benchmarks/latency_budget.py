"""B3: accuracy per measured millisecond, one shot, in ONNX Runtime with one thread.

Networks: ResNet-20 with its CIFAR-10 weights, and a MobileNetV2-like net that is trained here for a few epochs (and
kept beside --json). Contenders, each at 70 and 50 % of the unpruned net: DI guided by the latency table, DI guided by
MACs alone, uniform widths, and torch-pruning's L2 with `round_to=8`. The last three take the fraction of MACs for the
fraction of latency, as users do. BatchNorm is recalibrated on the same training images for all; nothing is fine-tuned.

First the two searches side by side, greedy and exact, on the same scores, table and budgets: predicted DI loss and
latency, seconds, and what the exact one says of its plan. `--searches` ends there.

    python benchmarks/latency_budget.py --data DIR --weights DIR [--quick] [--searches] [--json OUT]
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from protocol import Data, Notebook, arguments, network, print_targets, timed
from torch import Tensor, nn
from training import Recipe, from_scratch

from diplugin.accuracy import accuracy
from diplugin.costs import Budget, CostModel, LatencyCost, PeakActivationMemory, SeparableCost, macs, params
from diplugin.errors import InfeasibleBudget
from diplugin.groups import remove_channels
from diplugin.latency import measure_onnx, profile_here
from diplugin.latency.graphs import export_bytes
from diplugin.network import NetworkTrace, trace_network
from diplugin.plan import PruningPlan
from diplugin.recovery import recalibrate_batchnorm
from diplugin.scoring import score_groups
from diplugin.search import ExactSearch, FixedScores, GreedySearch, Search, greedy_search
from diplugin.strategies import search_by_clock
from diplugin.surgery import apply_plan

FRACTIONS = (0.7, 0.5)
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
SEARCHES: dict[str, Search] = {"greedy": GreedySearch(), "exact": ExactSearch()}


class Inverted(nn.Module):
    """Widen by a 1x1, filter each channel, narrow by a 1x1; a shortcut where shapes agree."""

    def __init__(self, cin: int, cout: int, stride: int, times: int) -> None:
        super().__init__()
        wide = cin * times
        self.body = nn.Sequential(
            nn.Conv2d(cin, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, cout, 1, bias=False), nn.BatchNorm2d(cout),
        )  # fmt: skip
        self.same = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_like() -> nn.Module:
    """MobileNetV2's blocks at CIFAR's resolution, about 25 million MACs."""
    stem = [nn.Conv2d(3, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()]
    shapes = [(24, 24, 1, 4), (24, 32, 2, 4), (32, 32, 1, 4), (32, 64, 2, 4), (64, 64, 1, 4), (64, 96, 1, 4)]
    head = [nn.Conv2d(96, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *(Inverted(*shape) for shape in shapes), *head, nn.Linear(256, 10))


@dataclass
class Bench:
    """One network with its table, scores and costs."""

    name: str
    model: nn.Module
    data: Data
    test_images: int
    trace: NetworkTrace
    latency: LatencyCost
    macs: SeparableCost
    scores: Mapping[str, Tensor]
    base_ms: float = 0.0

    inputs = (torch.zeros(1, 3, 32, 32),)

    @classmethod
    def of(cls, name: str, model: nn.Module, data: Data, quick: bool, test_images: int) -> Bench:
        trace = trace_network(model, cls.inputs)
        table = profile_here(model, cls.inputs, trace=trace, name=name, budget_s=30 if quick else 120)
        latency = LatencyCost(trace, table)
        print(f"{name}: {latency.text}", flush=True)
        scores = score_groups(model, data.calibration(500 if quick else 2000), trace.groups)
        bench = cls(name, model, data, test_images, trace, latency, macs(trace), scores.scores)
        bench.base_ms = bench.measure(model)
        return bench

    def measure(self, model: nn.Module) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.onnx"
            path.write_bytes(export_bytes(model, self.inputs, ["x"]))
            return measure_onnx(path).latency_ms

    def plan(self, cost: CostModel, limit: float) -> PruningPlan:
        """DI's greedy search under one budget."""
        scorer = FixedScores(self.trace.prunable, self.scores)
        return greedy_search(self.trace, scorer, [cost], [Budget(cost.name, limit=limit)])

    def cut(self, plan: PruningPlan) -> nn.Module:
        return apply_plan(copy.deepcopy(self.model), plan, self.inputs)

    def by_macs(self, fraction: float) -> nn.Module:
        return self.cut(self.plan(self.macs, fraction * self.macs.base))

    def by_latency(self, fraction: float) -> nn.Module:
        """As `compress` does on the device itself: by the table, then by the clock."""
        limit = fraction * self.base_ms

        def aimed(ms: float) -> PruningPlan:
            return self.plan(self.latency, ms)

        return self.cut(search_by_clock(aimed(limit), aimed, lambda plan: self.measure(self.cut(plan)), limit))

    def uniform(self, fraction: float) -> nn.Module:
        """Every group keeps the same fraction of its channels, the ones with the largest DI scores."""
        for keep in np.linspace(1, 0.05, 96):
            widths = {g.name: max(1, round(g.units * keep)) * g.blocks for g in self.trace.prunable}
            if self.macs.cost(widths) <= fraction * self.macs.base:
                break
        removed = {n: torch.argsort(self.scores[n])[: len(self.scores[n]) - w].tolist() for n, w in widths.items()}
        return remove_channels(copy.deepcopy(self.model), self.inputs, removed)

    def torch_pruning(self, fraction: float) -> nn.Module:
        """torch-pruning's global L2 with round_to=8, pruned step by step until its MACs are low enough."""
        model = copy.deepcopy(self.model)
        free = {m.layer for g in self.trace.prunable for m in g.members if m.side == "out"}
        layers = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
        ignored = [m for n, m in layers if n not in free]
        importance = tp.importance.GroupMagnitudeImportance(p=2)
        pruner = tp.pruner.BasePruner(model, self.inputs, importance, iterative_steps=50,
                                      global_pruning=True, pruning_ratio=0.95, round_to=8, ignored_layers=ignored,
                                      pruning_ratio_dict={})  # fmt: skip
        for _ in range(50):
            if macs(trace_network(model, self.inputs, verify=False)).base <= fraction * self.macs.base:
                break
            pruner.step()
        return model.eval()

    def row(self, contender: str, fraction: float, model: nn.Module) -> dict[str, Any]:
        recalibrate_batchnorm(model, self.data.calibration(1500), images=1500)
        measured = self.measure(model)
        trace = trace_network(model, self.inputs, verify=False)
        return {"net": self.name, "contender": contender, "fraction": fraction, "measured_ms": measured,
                "of_base": measured / self.base_ms, "macs": macs(trace).base / self.macs.base,
                "accuracy": 100 * accuracy(model, self.data.judge(self.test_images))}  # fmt: skip

    def contenders(self) -> Iterator[tuple[str, float, Callable[[], nn.Module]]]:
        for fraction in CURVE:
            yield "DI by latency", fraction, lambda f=fraction: self.by_latency(f)
            yield "DI by MACs", fraction, lambda f=fraction: self.by_macs(f)
        for fraction in FRACTIONS:
            yield "uniform", fraction, lambda f=fraction: self.uniform(f)
            yield "torch-pruning round_to=8", fraction, lambda f=fraction: self.torch_pruning(f)

    def searches(self) -> Iterator[dict[str, Any]]:
        """Rows of greedy and exact search under latency alone, and with parameters and peak memory besides."""
        costs: list[CostModel] = [self.latency, self.macs, params(self.trace), PeakActivationMemory(self.trace)]
        for fraction in CURVE:
            latency = Budget("latency_ms", fraction=fraction)
            others = [Budget("params", fraction=fraction), Budget("memory_mb", fraction=min(1.0, fraction + 0.2))]
            for what, budgets in (("latency", [latency]), ("latency, parameters, memory", [latency, *others])):
                for name, search in SEARCHES.items():
                    row = {"net": self.name, "contender": f"{name} search, {what}", "fraction": fraction}
                    scorer = FixedScores(self.trace.prunable, self.scores)
                    try:
                        plan, seconds = timed(lambda s=search, b=budgets, x=scorer: s(self.trace, x, costs, b))
                    except InfeasibleBudget:
                        yield {**row, "loss": None}
                        continue
                    yield {**row, "loss": plan.path[-1].loss, "predicted_ms": plan.costs["latency_ms"].predicted,
                           "of_base_predicted": plan.costs["latency_ms"].fraction, "seconds": seconds,
                           "found_by": plan.found_by}  # fmt: skip


def compare_searches(bench: Bench, notes: Notebook) -> None:
    """Print greedy and exact search side by side."""
    for row in bench.searches():
        if not notes.has(**{k: row[k] for k in ("net", "contender", "fraction")}):
            notes.add(row)
        said = "infeasible" if row["loss"] is None else (
            f"loss {row['loss']:9.4f}, {row['predicted_ms']:.4f} ms = {row['of_base_predicted']:.1%} of unpruned, "
            f"{row['seconds']:5.2f} s  {row['found_by'].removeprefix('exact search: ')}")  # fmt: skip
        print(f"  {row['contender']:43s} {row['fraction']:4.0%}: {said}", flush=True)


def losses_against_greedy(rows: list[dict[str, Any]]) -> list[float]:
    """Exact search's loss over greedy search's, for every net and budget that both have met."""
    found = {(r["net"], r["contender"], r["fraction"]): r["loss"] for r in rows if r.get("loss")}
    pairs = ((loss, found.get((net, contender.replace("exact", "greedy"), fraction)))
             for (net, contender, fraction), loss in found.items() if contender.startswith("exact"))  # fmt: skip
    return [loss / other for loss, other in pairs if other]


def faster_at_equal_accuracy(rows: list[dict[str, Any]], net: str) -> float | None:
    """How much slower the MACs-guided plan is than the latency-guided curve at its own accuracy; the median."""
    curves = {c: sorted((r["accuracy"], r["measured_ms"]) for r in rows if r["net"] == net and r["contender"] == c)
              for c in ("DI by latency", "DI by MACs")}  # fmt: skip
    if not curves["DI by latency"]:
        return None
    accuracies, times = np.array(curves["DI by latency"]).T
    ratios = [
        ms / np.interp(a, accuracies, times) for a, ms in curves["DI by MACs"] if accuracies[0] <= a <= accuracies[-1]
    ]
    return float(np.median(ratios)) if ratios else None


def targets_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    ours = [r for r in rows if r["contender"] == "DI by latency"]
    slowest = max((r["of_base"] for r in ours), default=None)
    over = max((r["of_base"] / r["fraction"] - 1 for r in ours), default=None)
    nets = dict.fromkeys(r["net"] for r in rows)
    searched = max(losses_against_greedy(rows), default=None)
    speed = {net: faster_at_equal_accuracy(rows, net) for net in nets}
    best = max((v for v in speed.values() if v is not None), default=None)
    return [
        {"name": "slowest plan of the unpruned net's time", "target": "<= 1", "value": slowest,
         "met": slowest is not None and slowest <= 1},
        {"name": "measured over the budget", "target": "<= 0.03", "value": over,
         "met": over is not None and over <= 0.03},
        {"name": "times faster than DI by MACs at equal accuracy, best net", "target": ">= 1.25", "value": best,
         "met": best is not None and best >= 1.25},
        {"name": "exact search's loss over greedy search's, the worst", "target": "<= 1", "value": searched,
         "met": searched is not None and searched <= 1 + 1e-9},
    ]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=4, help="to train the MobileNetV2-like net")
    parser.add_argument("--images", type=int, default=20_000, help="to train it on")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--searches", action="store_true", help="compare greedy and exact search, and time nothing")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = Data.read(args.data)
    kept = args.json.with_suffix(".mobilenet.safetensors") if args.json else None
    epochs, images = (1, 2000) if args.quick else (args.epochs, args.images)
    learning, seen = Recipe(epochs=epochs, images=images, lr=0.1), data.training(2000, images)
    nets = {"resnet20": lambda: network("resnet20", args.weights),
            "mobilenet-like": lambda: from_scratch(mobilenet_like, learning, *seen, seed=0, kept=kept)}  # fmt: skip
    notes = Notebook(args.json, ("net", "contender", "fraction"))
    for name, build in nets.items():
        bench = Bench.of(name, build(), data, args.quick, 1000 if args.quick else args.test_images)
        compare_searches(bench, notes)
        if args.searches:
            continue
        base = 100 * accuracy(bench.model, data.judge(bench.test_images))
        print(f"{name}: unpruned {bench.base_ms:.3f} ms, {base:.2f} %", flush=True)
        for contender, fraction, make in bench.contenders():
            if notes.has(net=name, contender=contender, fraction=fraction):
                continue
            try:
                row = bench.row(contender, fraction, make())
            except Exception as error:
                print(f"  {contender:26s} {fraction:.0%}: {type(error).__name__}: {error}", flush=True)
                continue
            print(f"  {contender:26s} {fraction:4.0%}: {row['measured_ms']:.3f} ms = {row['of_base']:.1%} of unpruned, "
                  f"{row['macs']:.1%} of its MACs, {row['accuracy']:.2f} %", flush=True)  # fmt: skip
            notes.add(row)
    targets = targets_of(notes.rows)[-1 if args.searches else 0 :]
    print_targets(targets)
    notes.write(targets)


if __name__ == "__main__":
    main()
