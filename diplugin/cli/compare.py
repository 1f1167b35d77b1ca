"""`diplugin compare`: criteria side by side on a user's own model and data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..whole_files import check_writable
from .common import Teller, add_data, add_model, data_of, model_of, positive, seed


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare", help="pruning criteria side by side on a model and its data",
        description="Prunes the model by every criterion of torch-pruning, by DI in the same pruner and by compress, "
        "to the same fractions of its MACs, repairs it without training, and judges on the test data. No training.",
    )  # fmt: skip
    add_model(parser)
    add_data(parser)
    parser.add_argument("--macs", type=_fractions, default=(0.7, 0.5, 0.3), metavar="F,F,…",
                        help="fractions of the unpruned MACs (default 0.7,0.5,0.3)")  # fmt: skip
    parser.add_argument("--images", type=positive, default=1500, help="training images to calibrate on (default 1500)")
    parser.add_argument("--test-images", type=positive, metavar="N", help="judge on the first N test images only")
    parser.add_argument(
        "--only", metavar="NAME,NAME", help="contenders whose names contain one of these (default: all)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parser.add_argument("--seed", type=seed, default=0, help="of every random choice (default 0)")
    parser.set_defaults(run=run)


def _fractions(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected fractions such as 0.7,0.5, got {text!r}") from None


def run(args: argparse.Namespace) -> int:
    from ..compare import compare_source, print_comparison

    if args.json:
        check_writable(args.json)
    model, inputs = model_of(args)
    with Teller() as tell:
        result = compare_source(
            model, data_of(args), example_inputs=inputs, fractions=args.macs, images=args.images,
            test_images=args.test_images, only=args.only, seed=args.seed, tell=tell,
        )  # fmt: skip
    print_comparison(result)
    if args.json:
        result.save(args.json)
    return 0
