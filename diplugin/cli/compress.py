"""`diplugin compress`: a model, data and budgets become a smaller model with its proof."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import Teller, add_data, add_model, data_of, model_of, positive, print_metrics, seed


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compress", help="prune a model to its budgets, recover, export and report",
        description="Budgets: macs=0.5 (a fraction of the unpruned cost), macs=60M, params=1M, latency_ms=12ms, "
        "memory_mb=2MB. Repeat --budget for several at once.",
    )  # fmt: skip
    add_model(parser)
    add_data(parser)
    parser.add_argument("--budget", action="append", required=True, metavar="COST=VALUE", help="repeatable")
    parser.add_argument("--table", metavar="FILE|NAME", help="latency table, for a latency_ms budget")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="run folder, new or empty")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="of recovery; 0 for none (default 5)")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of recovery (default 0.02)")
    parser.add_argument("--strategy", choices=("one-shot", "measured-cuts", "structure-distillation"),
                        default="one-shot",
                        help="prune at once; by a plan corrected by what trial cuts lose (minutes and more); or in "
                        "steps with the unpruned network as teacher between them (default one-shot)")  # fmt: skip
    parser.add_argument("--rounds", type=positive, metavar="N", help="of measured-cuts, at most (default 4)")
    parser.add_argument("--steps", type=positive, metavar="N", help="of structure-distillation (default 4)")
    parser.add_argument("--step-epochs", type=int, metavar="N",
                        help="of training after every step but the last (default 1); --epochs come on top")  # fmt: skip
    parser.add_argument("--search", choices=("greedy", "exact"), default="greedy",
                        help="how widths are chosen: step by step, or all at once by an integer program, which takes "
                        "up to half a minute and says how good its plan is (default greedy)")  # fmt: skip
    parser.add_argument("--no-teacher", action="store_true", help="fine-tune on the labels alone")
    parser.add_argument("--rho", type=float, default=10.0, help="relative ridge of DI (default 10)")
    parser.add_argument("--floor", type=float, default=0.1, help="fraction of every group that stays (default 0.1)")
    parser.add_argument("--align", type=positive, default=1, help="widths are multiples of this (default 1)")
    parser.add_argument("--images", type=positive, default=2000, help="training images scored (default 2000)")
    parser.add_argument("--bits", metavar="SIZE", help="also quantize, to a size such as size_mb=0.3MB")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, cuda:1 (default cpu)")
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice (default 0)")
    parser.add_argument(
        "--resume", action="store_true", help="go on with a run that was killed, not with a finished one"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..team import one_voice

    with one_voice() as team:
        return _run(args, first=team.rank == 0)


def _run(args: argparse.Namespace, first: bool) -> int:
    from ..costs import Budget
    from ..features import move_to
    from ..pipeline import compress
    from ..recovery import Distillation, FineTuning
    from ..run_folder import refuse_held
    from ..search import ExactSearch, GreedySearch, SearchLimits
    from ..tables import LatencyTable

    budgets = [Budget.parse(text) for text in args.budget]
    if first and not args.resume:
        refuse_held(args.out)
    table = LatencyTable.load(args.table) if args.table else None
    recovery = None
    if args.epochs:
        recovery = (FineTuning if args.no_teacher else Distillation)(epochs=args.epochs, lr=args.lr)
    strategy = _strategy(args)
    model, inputs = model_of(args)
    move_to(model, args.device)
    data = data_of(args)
    with Teller(quiet=not first) as tell:
        result = compress(
            model, data.train, example_inputs=inputs, budgets=budgets, latency_table=table, recovery=recovery,
            strategy=strategy, bits=_bits(args.bits), out=args.out, test_loader=data.test, augment=data.augment,
            rho=args.rho, limits=SearchLimits(floor=args.floor, align=args.align),
            search=(ExactSearch if args.search == "exact" else GreedySearch)(),
            images=args.images, seed=args.seed, resume=args.resume, tell=tell,
            source={"source": args.model, "data": args.data},
        )  # fmt: skip
    if first:
        print_metrics(result.metrics)
        print(f"open {args.out / 'report.html'}")
    return 0


def _strategy(args: argparse.Namespace) -> Any:
    from ..errors import UserError
    from ..recovery import FeatureDistillation, FineTuning
    from ..strategies import Geometric, MeasuredCuts, StructureDistillation

    name = args.strategy
    if name != "structure-distillation" and (args.steps is not None or args.step_epochs is not None):
        raise UserError(f"expected --steps and --step-epochs with --strategy structure-distillation, got {name}")
    if name != "measured-cuts" and args.rounds is not None:
        raise UserError(f"expected --rounds with --strategy measured-cuts, got {name}")
    if name == "one-shot":
        return None
    if name == "measured-cuts":
        return MeasuredCuts() if args.rounds is None else MeasuredCuts(args.rounds)
    epochs = 1 if args.step_epochs is None else args.step_epochs
    lesson = (FineTuning if args.no_teacher else FeatureDistillation)(epochs=epochs, lr=args.lr) if epochs else None
    return StructureDistillation(Geometric(args.steps or 4), lesson)


def _bits(text: str | None) -> Any:
    if text is None:
        return None
    from ..costs import Budget
    from ..quantize import Bits

    return Bits(budgets=(Budget.parse(text),))
