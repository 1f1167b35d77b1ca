"""B2: accuracy after recovery. Every contender gets the same fine-tuning; the last epoch counts.

    python benchmarks/fine_tune.py --data DIR --weights DIR [--only WORDS] [--seeds 0,1,2] [--epochs 10]
                                   [--images 20000] [--lr .02] [--teacher 0] [--judge test] [--compile]
                                   [--workers N] [--fractions .5,.3] [--json OUT] [--quick]
    python benchmarks/fine_tune.py --data DIR --weights DIR --long --device cuda --json OUT

Short form (CPU): ResNet-20 to 50 and 30 % of its MACs, 10 epochs on 20,000 images, lr .02 with a cosine, 3 seeds. Long
form (GPU): ResNet-56 to 1 / 2.11 and 1 / 2.6, 100 epochs on all images but the holdout, lr .01, milestones 60 and 80.
A killed run goes on where OUT ends, row by row; `--workers` deals the contenders out to so many processes.
`--teacher .7` lets the unpruned network teach every contender, as `Distillation` does in the product by default.

`L2, uniform, reconstructed` gives the structure of uniform widths and largest filter norms the refit that `compress`
gives its own; `DI, uniform, reconstructed` the same widths and the channels that `compress` ranks first. They tell what
of our lead is widths, what ranks and what repair. `DI, measured cuts` takes many minutes to choose before it trains.

Judged on test images. For choosing settings `--judge unfamiliar` reads training images held out of the fine-tuning and
disguised, `--judge holdout` the same as they are, which the networks knew by heart before they were pruned: it favours
whoever remembers more. `DI, measured cuts` has chosen by 2,000 of these images: judge it on test images alone.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from protocol import Data, Notebook, Recipe, Row, arguments, at_least, case_of, chosen, network, print_targets, prune
from torch import nn

from diplugin.accuracy import accuracy
from diplugin.compare import count_macs
from diplugin.contenders import Case, Compress, Contender, default_contenders
from diplugin.costs import macs
from diplugin.groups import ChannelGroup
from diplugin.recovery import Cut, Reconstruct
from diplugin.search import plan_at
from diplugin.strategies import MeasuredCuts, OneShot

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
        recipe = self.recipe
        return {"net": self.net, "epochs": recipe.epochs, "images": recipe.images, "lr": recipe.lr,
                "teacher": recipe.teacher_weight, "judge": self.judge}  # fmt: skip


@dataclass(frozen=True)
class Uniform:
    """The same share of every group's channels, then our refit: what of our lead is widths, what is ranks and repair.

    Attributes:
        worth: group name -> [channels] of a case; the largest stay.
    """

    name: str
    worth: Callable[[Case], Mapping[str, torch.Tensor]]

    def prune(self, case: Case, fractions: Sequence[float]) -> dict[float, nn.Module | None]:
        worth, cost = self.worth(case), macs(case.trace)
        plans = {f: plan_at(case.trace, worth, [cost], self._widths(case, f)) for f in fractions}
        return {f: Reconstruct().repaired(Cut(case.model, case.images, case.trace, plan)) for f, plan in plans.items()}

    def _widths(self, case: Case, fraction: float) -> dict[str, int]:
        cost, groups = macs(case.trace), case.trace.prunable
        for step in range(1000):
            widths = {g.name: max(1, round(g.channels * (1 - step / 1000))) for g in groups}
            if cost.cost(widths) <= fraction * cost.base:
                break
        return widths


def _norms(case: Case) -> dict[str, torch.Tensor]:
    """Squared norms of every channel's filters, over all layers that write it."""
    return {group.name: _squares(case.model, group) for group in case.trace.prunable}


def _di(case: Case) -> dict[str, torch.Tensor]:
    """What `compress` ranks channels by."""
    once = OneShot()
    return once.losses(case.trace, once.score(case.model, case.images, case.trace))


def _squares(model: nn.Module, group: ChannelGroup) -> torch.Tensor:
    total = torch.zeros(group.channels)
    for member in group.side("out"):
        weight: Any = model.get_submodule(member.layer).weight
        total.index_add_(0, torch.tensor(member.roots), weight.detach().pow(2).flatten(1).sum(1)[list(member.channels)])
    return total


@dataclass
class Bench:
    """One network, its contenders and what they share."""

    setting: Setting
    data: Data
    model: nn.Module
    book: Notebook
    judged: Any

    def __post_init__(self) -> None:
        self.case = case_of(self.model, self.data, CALIBRATION)
        self.base = count_macs(self.model, self.case.inputs)
        print(f"unpruned: {100 * accuracy(self.model, self.judged):.2f} %", flush=True)
        self.training = tuple(t.to(self.setting.device)
                              for t in self.data.training(CALIBRATION, self.setting.recipe.images))  # fmt: skip
        self.pruned: dict[tuple[str, float], nn.Module | None] = {}

    def run(self, contenders: Sequence[Contender], seeds: Sequence[int]) -> None:
        """The rows that the notebook does not hold, one seed of everybody before the next."""
        for seed in seeds:
            for contender in contenders:
                for fraction in self.setting.fractions:
                    self.row(contender, fraction, seed)

    def row(self, contender: Contender, fraction: float, seed: int) -> None:
        key = {**self.setting.key, "contender": contender.name, "target": fraction, "seed": seed}
        if self.book.has(**key):
            return
        pruned = self.cut(contender, fraction)
        if pruned is None:
            print(f"{contender.name}: {fraction:.0%} is out of reach")
            return
        row = {**key, "macs": count_macs(pruned, self.case.inputs) / self.base, "network": fingerprint(pruned)}
        row |= self.twin_of(row) or self.trained(pruned, seed)
        self.book.add(row)
        print(f"{self.setting.net} {fraction:4.0%} {contender.name:32} seed {seed}  "
              f"{row['one_shot']:6.2f} -> {row['top1']:6.2f}", flush=True)  # fmt: skip

    def cut(self, contender: Contender, fraction: float) -> nn.Module | None:
        key = contender.name, fraction
        if key not in self.pruned:
            self.pruned[key] = prune(contender, self.case, (fraction,)).get(fraction)
        return self.pruned[key]

    def trained(self, pruned: nn.Module, seed: int) -> Row:
        before = 100 * accuracy(pruned, self.judged)
        student = copy.deepcopy(pruned).to(self.setting.device)
        tuned = self.setting.recipe.train(student, *self.training, seed, self.model)
        return {"one_shot": before, "top1": 100 * accuracy(tuned.cpu(), self.judged)}

    def twin_of(self, row: Row) -> Row | None:
        """What the very same network came to with the same seed under another contender's name."""
        same = {**self.setting.key, "seed": row["seed"], "network": row["network"]}
        return next(({k: other[k] for k in ("one_shot", "top1")} for other in self.book.rows
                     if same.items() <= other.items()), None)  # fmt: skip


def contenders() -> list[Contender]:
    """Everybody: torch-pruning's criteria, ours, and what sets widths, ranks and repair apart."""
    return [
        *default_contenders(compress=False), Uniform("L2, uniform, reconstructed", _norms),
        Uniform("DI, uniform, reconstructed", _di), Compress(),
        Compress("DI, measured cuts", measured=MeasuredCuts(), tell=print),
    ]  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """Of every weight and buffer: two contenders that keep the same channels need one training."""
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())).hexdigest()[:16]


def share_out(workers: int) -> None:
    """This command once more in every worker, each with its share of the contenders.

    Raises:
        SystemExit: a worker failed; the rows of all are in OUT.
    """
    started = [subprocess.Popen([sys.executable, *sys.argv, "--worker", str(i)]) for i in range(workers)]
    codes = [worker.wait() for worker in started]
    if any(codes):
        raise SystemExit("a worker failed; what was measured is kept, and the same command goes on from there")


def medians(rows: Sequence[Row], setting: Setting, target: float) -> dict[str, float]:
    """Contender -> median over seeds."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if {**setting.key, "target": target}.items() <= row.items():
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


def parsed() -> argparse.Namespace:
    """The command line; `--quick` is one epoch at one cut for two contenders."""
    parser = arguments(__doc__)
    parser.add_argument("--long", action="store_true", help="ResNet-56 and 100 epochs; wants a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--fractions", help="of the MACs, such as .5,.3")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--teacher", dest="teacher_weight", type=float, metavar="SHARE", help="of the loss")
    parser.add_argument("--compile", dest="compiled", action="store_true", default=None, help="train compiled")
    parser.add_argument("--judge", choices=("test", "holdout", "unfamiliar"), default="test")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the work and OUT")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.workers > 1 and args.json is None:
        parser.error("--workers wants --json OUT, where their rows meet")
    if not 0 <= (args.teacher_weight or 0) <= 1:
        parser.error(f"expected --teacher in [0, 1], got {args.teacher_weight}")
    if args.quick:
        args.seeds, args.fractions, args.epochs, args.images = "0", "0.5", 1, 3_000
        args.only = args.only or "L2;compress"
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    setting = Setting(**(LONG if args.long else SHORT), device=args.device, judge=args.judge)
    changes = {
        k: v for k in ("epochs", "images", "lr", "teacher_weight", "compiled") if (v := getattr(args, k)) is not None
    }
    fractions = tuple(float(f) for f in args.fractions.split(",")) if args.fractions else setting.fractions
    return replace(setting, fractions=fractions, recipe=replace(setting.recipe, **changes))


def main() -> None:
    args = parsed()
    warnings.simplefilter("ignore")
    setting = setting_of(args)
    data = Data.read(args.data)
    read = {"test": data.judge, "holdout": data.holdout, "unfamiliar": data.unfamiliar}[args.judge]
    judged = read(1_000) if args.quick else read()
    book = Notebook(args.json, (*setting.key, "contender", "target", "seed"))
    wanted = list(chosen(contenders(), args.only))
    if args.workers > 1 and args.worker is None:
        share_out(args.workers)
        book = Notebook(args.json, book.keys)
    else:
        bench = Bench(setting, data, network(setting.net, args.weights), book, judged)
        bench.run(wanted[args.worker or 0 :: args.workers], [int(seed) for seed in args.seeds.split(",")])
    if args.worker is None:
        print_table(book.rows, setting)
        targets = targets_of(book.rows, setting)
        book.write(targets)
        print_targets(targets)


if __name__ == "__main__":
    main()
