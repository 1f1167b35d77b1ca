"""`diplugin quantize`: bits per output channel for the pruned network of a run folder, and a file that runs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .common import positive, seed


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quantize", help="give every channel of a run's network its own bits",
        description="Writes quantized.onnx and bits.json into the run folder, judges the file in ONNX Runtime, adds "
        "the figures to metrics.json and draws the report again. Budgets: size_mb=0.3MB, bops=2G, or a fraction of "
        "what 8 bits everywhere cost: size_mb=0.6.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("data", metavar="DATA", help="as given to compress; training images calibrate")
    parser.add_argument("--budget", action="append", required=True, metavar="COST=VALUE", help="repeatable")
    parser.add_argument(
        "--model", metavar="MODEL",
        help="the unpruned architecture, as given to compress; only needed where the run does not record it",
    )  # fmt: skip
    parser.add_argument("--epochs", type=int, default=0, metavar="N", help="of quantization-aware training (default 0)")
    parser.add_argument("--lr", type=float, default=0.002, help="its peak learning rate (default 0.002)")
    parser.add_argument("--images", type=positive, default=500, help="training images that calibrate (default 500)")
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images a batch (default 128)")
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice (default 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..costs import Budget
    from ..holdout import split_holdout
    from ..onnx_inference import NO_INT8_KERNELS, int8_saturates
    from ..quantize import Bits, quantize_run
    from ..recovery import Distillation
    from ..report import read_run, write_report
    from ..run_folder import METRICS, cut_figures, read_json
    from ..sources import load_data, load_model
    from ..surgery import load_pruned
    from .export import _recorded_model

    finetune = Distillation(epochs=args.epochs, lr=args.lr) if args.epochs else None
    budgets = tuple(Budget.parse(text) for text in args.budget)
    bits = Bits(budgets, finetune=finetune, images=args.images, seed=args.seed)
    whole = read_run(args.folder)  # nothing is written into a folder that could not take the figures
    cut_figures(read_json(args.folder / METRICS), args.folder)
    plan, (holdout, seed) = whole.plan, _recorded_split(whole.config)
    model = load_pruned(load_model(args.model or _recorded_model(args.folder)), args.folder).eval()
    data = load_data(args.data, example_shape=plan.inputs[0].shape, batch_size=args.batch_size)
    split = split_holdout(data.train, holdout, seed)
    _, figures = quantize_run(
        model, split.scoring, tuple(spec.example() for spec in plan.inputs), bits, folder=args.folder,
        judge=data.test if data.test is not None else split.holdout, training_loader=split.training,
    )  # fmt: skip
    _add_figures(args.folder, figures)
    write_report(args.folder)
    print(f"quantized.onnx: {figures['size_mb']:.3f} MB ({figures['mean_bits']:.2f} bits a weight; 8 bits everywhere "
          f"{figures['size_mb_uniform8']:.3f} MB), accuracy {figures['accuracy']:.2%} in ONNX Runtime")  # fmt: skip
    if int8_saturates():
        print(f"  ONNX Runtime's int8 kernels saturate on this machine: run the file with {NO_INT8_KERNELS}=1 here")
    for layer, reason in figures["kept_float"].items():
        print(f"  {layer} stays in float: {reason}")
    return 0


def _recorded_split(config: Mapping[str, Any]) -> tuple[float, int]:
    """The fraction that a run has set aside, and its seed."""
    from ..configuration import LARGEST_SEED, is_seed
    from ..errors import PlanError

    holdout, seed = config.get("holdout", 0.1), config.get("seed", 0)
    if not isinstance(holdout, float) or not 0 < holdout < 1:
        raise PlanError(f"expected a fraction as the run's 'holdout' in its config.json, got {holdout!r:.80}")
    if not is_seed(seed):
        raise PlanError(f"expected 0 to {LARGEST_SEED} as the run's 'seed' in its config.json, got {seed!r:.80}")
    return holdout, seed


def _add_figures(folder: Path, figures: dict[str, Any]) -> None:
    from ..run_folder import METRICS, cut_figures, read_json
    from ..whole_files import write_json

    metrics = read_json(folder / METRICS)
    last = cut_figures(metrics, folder)
    same = {name: last.get(name) for name in ("macs", "params", "memory_mb")}
    metrics["quantized"] = {**dict.fromkeys(last), **same, **figures}
    write_json(folder / METRICS, metrics)
