"""Does structure distillation earn its place? The same number of training steps for every way to a smaller network.

    python benchmarks/structure_distillation.py --data DIR --weights DIR [--json OUT] [--quick] [--judge test]
        [--epochs 10] [--steps 4] [--images 20000] [--seeds 0] [--fractions .5,.3] [--net resnet20] [--variants]

Three ways to 50 and 30 % of ResNet-20's MACs, each with E epochs in all: *one shot*, cut at once and then taught by the
unpruned network; *structure distillation*, S - 1 lessons of one epoch between S cuts and the rest of the epochs behind
the last one; and *its structure at once*, what structure distillation ended with, cut out of the unpruned network in
one go, repaired, and fine-tuned for E epochs on the labels alone or with the teacher. `--variants` adds other settings
of structure distillation (new scores at every step, other lessons, another schedule) and other recoveries of one shot.

Every row goes through `diplugin.compress`, channels ranked by loss and energy as where STUDY.md sets out. Judged on
training images that nobody trains on; `--judge test` reads the test images instead, for the last word. Rows found in
OUT are kept.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from protocol import (
    MEAN,
    STD,
    Batches,
    Data,
    Notebook,
    Row,
    arguments,
    at_least,
    chosen,
    network,
    print_targets,
    timed,
)
from torch import nn
from torch.utils.data import DataLoader

import diplugin
from diplugin.plan import PruningPlan
from diplugin.ranking import ByBoth
from diplugin.recovery import Distillation, FeatureDistillation, FineTuning
from diplugin.scoring import GroupScores
from diplugin.sources import Images, flip_and_shift
from diplugin.strategies import Geometric, Job, Linear, OneShot, Shrunk, Strategy, StructureDistillation

OURS = "structure distillation"
PLAIN = "its structure at once, labels alone"
LR = 0.02


@dataclass(frozen=True)
class AtOnce:
    """A strategy that carries out a plan that is known already."""

    plan: PruningPlan

    def record(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "widths": self.plan.widths}

    def shrink(self, once: OneShot, job: Job, scores: GroupScores) -> Shrunk:
        model, _ = once.carve(job.model, job.split.scoring, job.trace, self.plan, job.judge)
        return Shrunk(model, job.keep(self.plan))


@dataclass(frozen=True)
class Setting:
    """One form of the benchmark: `epochs` in all, `steps` cuts where a contender cuts gradually."""

    net: str
    fractions: tuple[float, ...]
    epochs: int
    steps: int
    images: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """A contender: from the setting, and the plan of structure distillation at this cut, how the network shrinks and
    how it recovers; None where that plan is not known."""

    name: str
    make: Callable[[Setting, PruningPlan | None], tuple[Strategy | None, FineTuning] | None]


def gradual(name: str, lesson: type[FineTuning], schedule: Callable[[int], Any] = Geometric, **options: Any) -> Way:
    def make(setting: Setting, _: PruningPlan | None) -> tuple[Strategy, FineTuning]:
        strategy = StructureDistillation(schedule(setting.steps), lesson(epochs=1, lr=LR), **options)
        return strategy, Distillation(epochs=setting.epochs - setting.steps + 1, lr=LR)

    return Way(name, make)


def at_once(name: str, recovery: type[FineTuning]) -> Way:
    def make(setting: Setting, plan: PruningPlan | None) -> tuple[Strategy, FineTuning] | None:
        return None if plan is None else (AtOnce(plan), recovery(epochs=setting.epochs, lr=LR))

    return Way(name, make)


def one_shot(name: str, recovery: type[FineTuning]) -> Way:
    return Way(name, lambda setting, _: (None, recovery(epochs=setting.epochs, lr=LR)))


WAYS = (
    one_shot("one shot", Distillation), gradual(OURS, FeatureDistillation),
    at_once(PLAIN, FineTuning), at_once("its structure at once, taught", Distillation),
)  # fmt: skip
VARIANTS = (
    one_shot("one shot, features matched", FeatureDistillation), one_shot("one shot, labels alone", FineTuning),
    gradual("gradual, scored anew at every step", FeatureDistillation, rescore=True),
    gradual("gradual, lessons without features", Distillation),
    gradual("gradual, lessons of labels alone", FineTuning),
    gradual("gradual, linear schedule", FeatureDistillation, Linear),
)  # fmt: skip


def run(setting: Setting, ways: Sequence[Way], data: Data, model: nn.Module, book: Notebook, judged: Batches) -> None:
    """The rows that the notebook does not hold."""
    x, y = (t[: setting.images].numpy() for t in data.train)
    loader = DataLoader(Images(x, y, MEAN, STD), batch_size=128)
    for fraction in setting.fractions:
        for seed in setting.seeds:
            for way in ways:
                row = {"net": setting.net, "contender": way.name, "target": fraction, "seed": seed}
                made = way.make(setting, _plan_of(book, row))
                if book.has(**row) or made is None:
                    continue
                strategy, recovery = made

                def compressed(
                    strategy: Any = strategy, recovery: Any = recovery, fraction: float = fraction, seed: int = seed
                ) -> diplugin.CompressionResult:
                    return diplugin.compress(
                        model, loader, example_inputs=(judged[0][0][:1],), recovery=recovery, strategy=strategy,
                        ranking=ByBoth(),
                        budgets=[diplugin.Budget("macs", fraction=fraction)], augment=flip_and_shift, seed=seed,
                        test_loader=judged, tell=lambda line: print("   ", line, flush=True),
                    )  # fmt: skip

                book.add(row | _figures(*timed(compressed), setting))
                print(_line(book.rows[-1]), flush=True)


def _figures(result: diplugin.CompressionResult, seconds: float, setting: Setting) -> Row:
    base, cut, tuned = (result.metrics[stage] for stage in ("base", "pruned", "recovered"))
    plan = PruningPlan(result.plan.kept, result.plan.channels, result.plan.costs, result.plan.inputs)
    return {"epochs": setting.epochs, "images": setting.images, "macs": cut["macs"] / base["macs"],
            "base": 100 * base["accuracy"], "before": 100 * cut["accuracy"], "top1": 100 * tuned["accuracy"],
            "seconds": seconds, "steps": result.metrics.get("steps"), "plan": plan.to_json()}  # fmt: skip


def _line(row: Row) -> str:
    return (f"{row['net']} {row['target']:4.0%} {row['contender']:40} seed {row['seed']}  "
            f"{row['before']:6.2f} -> {row['top1']:6.2f}  ({row['seconds']:.0f} s)")  # fmt: skip


def _plan_of(book: Notebook, key: Row) -> PruningPlan | None:
    """What structure distillation came to at this cut, with this seed."""
    wanted = {**key, "contender": OURS}
    found = (row["plan"] for row in book.rows if all(row.get(k) == v for k, v in wanted.items()))
    text = next(found, None)
    return None if text is None else PruningPlan.from_json(text)


def medians(rows: Sequence[Row], net: str, target: float) -> dict[str, float]:
    """Contender -> median over seeds."""
    here = [row for row in rows if (row["net"], row["target"]) == (net, target)]
    return {name: statistics.median(r["top1"] for r in here if r["contender"] == name)
            for name in dict.fromkeys(r["contender"] for r in here)}  # fmt: skip


def targets_of(rows: Sequence[Row], setting: Setting) -> Iterator[Row]:
    for fraction in setting.fractions:
        table = medians(rows, setting.net, fraction)
        for other in (PLAIN, "one shot"):
            lead = table[OURS] - table[other] if OURS in table and other in table else None
            yield at_least(f"{setting.net}, {fraction:.0%} MACs, points ahead of {other}", 0.0, lead)


def print_table(rows: Sequence[Row], setting: Setting) -> None:
    print(f"\n{setting.net}, {setting.epochs} epochs in all, median over seeds"
          + "".join(f"{f:>9.0%}" for f in setting.fractions))  # fmt: skip
    tables = [medians(rows, setting.net, f) for f in setting.fractions]
    for name in dict.fromkeys(name for table in tables for name in table):
        print(f"{name:44}" + "".join(f"{t[name]:9.2f}" if name in t else "        –" for t in tables))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--fractions", default=".5,.3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=int, default=10, help="in all")
    parser.add_argument("--steps", type=int, default=4, help="cuts of structure distillation")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--judge", choices=("test", "holdout"), default="holdout")
    parser.add_argument("--variants", action="store_true", help="other settings besides")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    fractions, seeds = tuple(map(float, args.fractions.split(","))), tuple(map(int, args.seeds.split(",")))
    setting = Setting(args.net, fractions, args.epochs, args.steps, args.images, seeds)
    if args.quick:
        setting = Setting(args.net, (0.5,), 2, 2, 2_000, (0,))
    if setting.epochs < setting.steps:
        parser.error(f"expected more epochs than lessons, got {setting.epochs} epochs and {setting.steps} steps")
    data = Data.read(args.data)
    read = data.judge if args.judge == "test" else data.holdout
    judged = read(1_000) if args.quick else read()
    book = Notebook(args.json, ("net", "contender", "target", "seed"))
    ways = list(chosen((*WAYS, *VARIANTS) if args.variants else WAYS, args.only))
    run(setting, ways, data, network(setting.net, args.weights), book, judged)
    print_table(book.rows, setting)
    targets = list(targets_of(book.rows, setting))
    book.write(targets)
    print_targets(targets)


if __name__ == "__main__":
    main()
