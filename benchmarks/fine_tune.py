"""B2: accuracy after recovery. Every contender gets the same fine-tuning; the last epoch counts.

    python benchmarks/fine_tune.py --data DIR --weights DIR [--only WORDS] [--seeds 0,1,2] [--epochs 10]
                                   [--images 20000] [--lr .02] [--teacher 0] [--judge test] [--compile]
                                   [--workers N] [--fractions .5,.3] [--cuts DIR] [--json OUT] [--quick]
    python benchmarks/fine_tune.py --data DIR --weights DIR --long --device cuda --together 4 --json OUT

Short form (CPU): ResNet-20 to 50 and 30 % of its MACs, 10 epochs on 20,000 images, lr .02 with a cosine, 3 seeds. Long
form (GPU): ResNet-56 to 1 / 2.11 and 1 / 2.6, 100 epochs on all images but the holdout, lr .01, milestones 60 and 80.
A killed run goes on where OUT ends, row by row, and inside a row every 2,000 steps; `--workers` deals the contenders
out to so many processes, `--together` trains so many networks at once on one GPU. `--cuts` keeps the pruned networks in
a folder, and with `--cut` nothing is trained: prune where there is time, train where there is a GPU.
`--teacher .7` lets the unpruned network teach every contender, as `Distillation` does in the product by default.

Contenders are torch-pruning's criteria, DI beside them and `compress`, all as users get them, and DI in its order for
uniform widths that are trained afterwards. `--only` may name the variants of `fine_tune_variants.py` too, which take
our lead apart; those with measured cuts take many minutes to choose before they train.

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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cuts import Cuts
from fine_tune_variants import orders, variants
from protocol import Data, Notebook, Row, arguments, at_least, case_of, chosen, network, print_targets, prune
from torch import nn
from training import Recipe, Training, train_together

from diplugin.accuracy import accuracy
from diplugin.compare import count_macs
from diplugin.contenders import Contender, default_contenders

CALIBRATION = 1_500
SHORT = {"net": "resnet20", "fractions": (0.5, 0.3), "recipe": Recipe()}
LONG = {"net": "resnet56", "fractions": (1 / 2.11, 1 / 2.6),
        "recipe": Recipe(epochs=100, images=45_000 - CALIBRATION, lr=0.01, milestones=(60, 80))}  # fmt: skip
LEAD = 0.5
#: DI where the order of channels is all that it says: as it is by default, and as it is meant for this case.
ORDERS = ("DI, local", "DI by energy and norms, local")


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
                "teacher": recipe.teacher_weight, "bf16": recipe.bf16, "judge": self.judge}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One row to be."""

    contender: Contender
    fraction: float
    seed: int


@dataclass
class Bench:
    """One network, its contenders and what they share."""

    setting: Setting
    data: Data
    model: nn.Module
    book: Notebook
    judged: Any
    cuts: Cuts

    def __post_init__(self) -> None:
        self.case = case_of(self.model, self.data, CALIBRATION)
        self.base = count_macs(self.model, self.case.inputs)
        device = torch.device(self.setting.device)
        self.judged = [(x.to(device), y.to(device)) for x, y in self.judged]
        print(f"unpruned: {100 * accuracy(copy.deepcopy(self.model).to(device), self.judged):.2f} %", flush=True)
        self.training = tuple(t.to(device) for t in self.data.training(CALIBRATION, self.setting.recipe.images))
        self.pruned: dict[tuple[str, float], nn.Module | None] = {}

    def run(self, contenders: Sequence[Contender], seeds: Sequence[int], together: int = 1) -> None:
        """The rows that the notebook does not hold, one seed of everybody before the next."""
        jobs = [Job(c, f, seed) for seed in seeds for c in contenders for f in self.setting.fractions]
        jobs = [job for job in jobs if not self.book.has(**self.key(job))]
        for first in range(0, len(jobs), together):
            self.rows(jobs[first : first + together])

    def key(self, job: Job) -> Row:
        return {**self.setting.key, "contender": job.contender.name, "target": job.fraction, "seed": job.seed}

    def rows(self, jobs: Sequence[Job]) -> None:
        """Train what nobody has trained yet, all at once, and note every job's row."""
        rows: list[tuple[Row, nn.Module]] = []
        for job in jobs:
            pruned = self.cut(job.contender, job.fraction)
            if pruned is None:
                print(f"{job.contender.name}: {job.fraction:.0%} is out of reach")
                continue
            cost = count_macs(pruned, self.case.inputs) / self.base
            rows.append(({**self.key(job), "macs": cost, "network": fingerprint(pruned)}, pruned))
        new = {(row["network"], row["seed"]): (row, pruned) for row, pruned in rows if not self.twin_of(row)}
        trained = dict(zip(new, self.trained(list(new.values())), strict=True))
        for row, _ in rows:
            row |= self.twin_of(row) or trained[row["network"], row["seed"]]
            self.book.add(row)
            print(f"{self.setting.net} {row['target']:4.0%} {row['contender']:32} seed {row['seed']}  "
                  f"{row['one_shot']:6.2f} -> {row['top1']:6.2f}", flush=True)  # fmt: skip

    def cut_all(self, contenders: Sequence[Contender]) -> None:
        """Networks for `Cuts` to keep."""
        for contender in contenders:
            for fraction in self.setting.fractions:
                pruned = self.cut(contender, fraction)
                share = count_macs(pruned, self.case.inputs) / self.base if pruned is not None else None
                print(f"{contender.name:32} {fraction:4.0%} "
                      f"{'out of reach' if share is None else f'{share:.4f} of the MACs'}", flush=True)  # fmt: skip

    def cut(self, contender: Contender, fraction: float) -> nn.Module | None:
        key = contender.name, fraction
        if key not in self.pruned:
            self.pruned[key] = self.cuts.get(*key, lambda: prune(contender, self.case, (fraction,)).get(fraction))
        return self.pruned[key]

    def trained(self, new: Sequence[tuple[Row, nn.Module]]) -> list[Row]:
        """What the judge says of networks before and after their training."""
        if not new:
            return []
        students = [copy.deepcopy(pruned).to(self.setting.device) for _, pruned in new]
        before = [100 * accuracy(student, self.judged) for student in students]
        trainings = [Training(self.setting.recipe, student, *self.training, row["seed"], self.model)
                     for student, (row, _) in zip(students, new, strict=True)]  # fmt: skip
        train_together(trainings, [path for row, _ in new if (path := self.book.beside(row))])
        after = [100 * accuracy(student, self.judged) for student in students]
        found = zip(before, after, strict=True)
        return [{"one_shot": b, "top1": a, "device": self.training[0].device.type} for b, a in found]

    def twin_of(self, row: Row) -> Row | None:
        """What the very same network came to with the same seed under another contender's name."""
        same = {**self.setting.key, "seed": row["seed"], "network": row["network"]}
        return next(({k: other[k] for k in ("one_shot", "top1", "device") if k in other} for other in self.book.rows
                     if same.items() <= other.items()), None)  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """Of every weight and buffer: two contenders that keep the same channels need one training."""
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in model.state_dict().values())).hexdigest()[:16]


def contenders() -> list[Contender]:
    """Everybody who counts."""
    return [*default_contenders(), *(variant for variant in orders() if variant.name in ORDERS)]


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
    """Of what users get; variants count for nothing here."""
    names = {contender.name for contender in contenders()}
    targets = []
    for fraction in setting.fractions:
        table = {name: v for name, v in medians(rows, setting, fraction).items() if name in names}
        ours = [v for n, v in table.items() if n.startswith("DI")]
        others = [v for n, v in table.items() if not n.startswith("DI")]
        lead = max(ours) - max(others) if ours and others else None
        at = f"{setting.net}, {fraction:.0%} MACs"
        targets.append(at_least(f"{at}, points ahead of every other", LEAD, lead))
        for name in ORDERS:
            order = table[name] - table["L2, local"] if {name, "L2, local"} <= table.keys() else None
            targets.append(at_least(f"{at}, uniform widths, {name}, points ahead of L2", 0.0, order))
        if setting.net == "resnet56":
            bound = 94.2 if fraction > 0.45 else 93.8
            targets.append(at_least(f"{at}, top-1", bound, max(ours, default=None)))
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
    parser.add_argument("--bf16", action="store_true", default=None, help="train in bfloat16")
    parser.add_argument("--judge", choices=("test", "holdout", "unfamiliar"), default="test")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that share the work and OUT")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--together", type=int, default=1, metavar="N", help="networks that train at once on a GPU")
    parser.add_argument("--cuts", type=Path, metavar="DIR", help="where pruned networks are kept and looked for")
    parser.add_argument("--cut", action="store_true", help="prune into --cuts and train nothing")
    args = parser.parse_args()
    if args.workers > 1 and args.json is None:
        parser.error("--workers wants --json OUT, where their rows meet")
    if args.cut and args.cuts is None:
        parser.error("--cut wants --cuts DIR, where the networks go")
    if args.together < 1 or (args.together > 1 and args.device == "cpu"):
        parser.error(f"expected --together 1, or more on a GPU, got {args.together} on {args.device}")
    if not 0 <= (args.teacher_weight or 0) <= 1:
        parser.error(f"expected --teacher in [0, 1], got {args.teacher_weight}")
    if args.quick:
        args.seeds, args.fractions, args.epochs, args.images = "0", "0.5", 1, 3_000
        args.only = args.only or "L2, local;DI, compress"
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    setting = Setting(**(LONG if args.long else SHORT), device=args.device, judge=args.judge)
    names = ("epochs", "images", "lr", "teacher_weight", "compiled", "bf16")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    fractions = tuple(float(f) for f in args.fractions.split(",")) if args.fractions else setting.fractions
    return replace(setting, fractions=fractions, recipe=replace(setting.recipe, **changes))


def main() -> None:
    args = parsed()
    warnings.simplefilter("ignore")
    setting = setting_of(args)
    torch.backends.cudnn.benchmark = args.long  # to try kernels out takes seconds a network
    data = Data.read(args.data)
    read = {"test": data.judge, "holdout": data.holdout, "unfamiliar": data.unfamiliar}[args.judge]
    judged = read(1_000) if args.quick else read()
    book = Notebook(args.json, (*setting.key, "contender", "target", "seed"))
    everybody = contenders()
    others = [variant for variant in variants() if variant.name not in ORDERS]
    wanted = list(chosen([*everybody, *others], args.only)) if args.only else everybody
    if args.workers > 1 and args.worker is None:
        share_out(args.workers)
        book = Notebook(args.json, book.keys)
    else:
        cuts = Cuts(args.cuts and args.cuts / setting.net, lambda: network(setting.net, args.weights))
        bench = Bench(setting, data, cuts.fresh(), book, judged, cuts)
        mine = wanted[args.worker or 0 :: args.workers]
        if args.cut:
            bench.cut_all(mine)
        else:
            bench.run(mine, [int(seed) for seed in args.seeds.split(",")], args.together)
    if args.worker is None and not args.cut:
        print_table(book.rows, setting)
        targets = targets_of(book.rows, setting) if args.judge == "test" else []
        book.write(targets)
        print_targets(targets)


if __name__ == "__main__":
    main()
