"""B2: accuracy after recovery. Every contender gets the same fine-tuning; the last epoch counts.

    python benchmarks/fine_tune.py --data DIR --weights DIR [--only WORDS] [--seeds 0,1,2] [--epochs 10]
                                   [--images 20000] [--compile] [--json OUT] [--quick]
    python benchmarks/fine_tune.py --data DIR --weights DIR --long --device cuda --json OUT

Short form (CPU): ResNet-20 to 50 and 30 % of its MACs, 10 epochs on 20,000 images, lr .02 with a cosine, 3 seeds. Long
form (GPU): ResNet-56 to 1 / 2.11 and 1 / 2.6, 100 epochs on all images but the holdout, lr .01, milestones 60 and 80.
A killed run goes on where OUT ends, row by row.

`L2, uniform, reconstructed` gives the structure of uniform widths and largest filter norms the refit that `compress`
gives its own: what of our lead is selection and what is repair. Judged on test images; `--judge holdout` reads training
images instead, for choosing settings.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from protocol import Data, Notebook, Recipe, Row, arguments, at_least, case_of, chosen, network, print_targets, prune
from torch import nn

from diplugin.accuracy import accuracy
from diplugin.compare import count_macs
from diplugin.contenders import Case, Compress, Contender, default_contenders
from diplugin.costs import macs
from diplugin.groups import ChannelGroup
from diplugin.plan import PlannedCost, PruningPlan
from diplugin.recovery import Cut, Reconstruct

CALIBRATION = 1_500
SHORT = {"net": "resnet20", "fractions": (0.5, 0.3), "recipe": Recipe()}
LONG = {"net": "resnet56", "fractions": (1 / 2.11, 1 / 2.6),
        "recipe": Recipe(epochs=100, images=45_000 - CALIBRATION, lr=0.01, milestones=(60, 80))}  # fmt: skip
LEAD = 0.5


@dataclass(frozen=True)
class Setting:
    """One form of the benchmark."""

    net: str
    fractions: tuple[float, ...]
    recipe: Recipe
    device: str = "cpu"
    judge: str = "test"

    @property
    def key(self) -> Row:
        """What a row must share with this run to be one of its rows."""
        return {"net": self.net, "epochs": self.recipe.epochs, "images": self.recipe.images, "judge": self.judge}


@dataclass(frozen=True)
class ReconstructedL2:
    """The same share of every group's channels, those of largest filter norm, then our refit; for comparison."""

    name: str = "L2, uniform, reconstructed"

    def prune(self, case: Case, fractions: Sequence[float]) -> dict[float, nn.Module | None]:
        return {f: Reconstruct().repaired(Cut(case.model, case.images, case.trace, self._plan(case, f)))
                for f in fractions}  # fmt: skip

    def _plan(self, case: Case, fraction: float) -> PruningPlan:
        cost, groups = macs(case.trace), case.trace.prunable
        for step in range(1000):
            widths = {g.name: max(1, round(g.channels * (1 - step / 1000))) for g in groups}
            if cost.cost({**case.trace.base_widths, **widths}) <= fraction * cost.base:
                break
        kept = {g.name: tuple(sorted(_norms(case.model, g).topk(widths[g.name]).indices.tolist())) for g in groups}
        planned = {"macs": PlannedCost(cost.base, cost.cost({**case.trace.base_widths, **widths}))}
        return PruningPlan(kept, case.trace.base_widths, planned, case.trace.inputs)


def _norms(model: nn.Module, group: ChannelGroup) -> torch.Tensor:
    total = torch.zeros(group.channels)
    for member in group.side("out"):
        weight: Any = model.get_submodule(member.layer).weight
        total.index_add_(0, torch.tensor(member.roots), weight.detach().pow(2).flatten(1).sum(1)[list(member.channels)])
    return total


def run(setting: Setting, contenders: Sequence[Contender], data: Data, model: nn.Module, seeds: Sequence[int],
        book: Notebook, judged: Any) -> None:  # fmt: skip
    """The rows that the notebook does not hold."""
    case = case_of(model, data, CALIBRATION)
    x, y = (t.to(setting.device) for t in data.training(CALIBRATION, setting.recipe.images))
    for contender in contenders:
        for fraction in setting.fractions:
            row = {**setting.key, "contender": contender.name, "target": fraction}
            left = [seed for seed in seeds if not book.has(**row, seed=seed)]
            if not left:
                continue
            pruned = prune(contender, case, (fraction,)).get(fraction)
            if pruned is None:
                print(f"{contender.name}: {fraction:.0%} is out of reach")
                continue
            before = 100 * accuracy(pruned, judged)
            share = count_macs(pruned, case.inputs) / count_macs(model, case.inputs)
            for seed in left:
                tuned = setting.recipe.train(copy.deepcopy(pruned).to(setting.device), x, y, seed)
                top1 = 100 * accuracy(tuned.cpu(), judged)
                book.add({**row, "seed": seed, "macs": share, "one_shot": before, "top1": top1})
                print(f"{setting.net} {fraction:4.0%} {contender.name:32} seed {seed}  {before:6.2f} -> {top1:6.2f}",
                      flush=True)  # fmt: skip


def medians(rows: Sequence[Row], setting: Setting, target: float) -> dict[str, float]:
    """Contender -> median over seeds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if {**row, **setting.key, "target": target} == row:
            found.setdefault(row["contender"], []).append(row["top1"])
    return {name: statistics.median(values) for name, values in found.items()}


def targets_of(rows: Sequence[Row], setting: Setting) -> list[Row]:
    targets = []
    for fraction in setting.fractions:
        table = medians(rows, setting, fraction)
        ours = [v for n, v in table.items() if n.startswith("DI")]
        others = [v for n, v in table.items() if not n.startswith("DI")]
        lead = max(ours) - max(others) if ours and others else None
        targets.append(at_least(f"{setting.net}, {fraction:.0%} MACs, points ahead of every other", LEAD, lead))
        if setting.net == "resnet56":
            bound = 94.2 if fraction > 0.45 else 93.8
            targets.append(at_least(f"{setting.net}, {fraction:.0%} MACs, top-1", bound, max(ours, default=None)))
    return targets


def print_table(rows: Sequence[Row], setting: Setting) -> None:
    print(f"\n{setting.net}, median over seeds" + "".join(f"{f:>9.0%}" for f in setting.fractions))
    tables = [medians(rows, setting, f) for f in setting.fractions]
    for name in sorted(tables[0], key=lambda n: -tables[0][n]):
        print(f"{name:32}" + "".join(f"{t[name]:9.2f}" if name in t else "        –" for t in tables))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--long", action="store_true", help="ResNet-56 and 100 epochs; wants a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--compile", dest="compiled", action="store_true", default=None, help="train compiled")
    parser.add_argument("--judge", choices=("test", "holdout"), default="test")
    args: argparse.Namespace = parser.parse_args()
    warnings.simplefilter("ignore")
    setting = Setting(**(LONG if args.long else SHORT), device=args.device, judge=args.judge)
    changes = {k: v for k in ("epochs", "images", "compiled") if (v := getattr(args, k)) is not None}
    setting = replace(setting, recipe=replace(setting.recipe, **changes))
    seeds = [int(s) for s in args.seeds.split(",")]
    only = args.only
    if args.quick:
        setting = replace(setting, fractions=(0.5,), recipe=replace(setting.recipe, epochs=1, images=3_000))
        seeds, only = seeds[:1], only or "L2;compress"
    data = Data.read(args.data)
    read = data.holdout if args.judge == "holdout" else data.judge
    judged = read(1_000) if args.quick else read()
    book = Notebook(None if args.json is None else Path(args.json), (*setting.key, "contender", "target", "seed"))
    contenders = list(chosen([*default_contenders(compress=False), ReconstructedL2(), Compress()], only))
    run(setting, contenders, data, network(setting.net, args.weights), seeds, book, judged)
    print_table(book.rows, setting)
    targets = targets_of(book.rows, setting)
    book.write(targets)
    print_targets(targets)


if __name__ == "__main__":
    main()
