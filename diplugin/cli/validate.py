"""`diplugin validate`: DI checked by scikit-learn on the user's own model and data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import add_data, add_model, data_of, model_of, positive, seed

if TYPE_CHECKING:
    from ..reference import LayerValidation


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "validate",
        help="check DI against scikit-learn on a model's own features",
        description="Compute DI and, by scikit-learn alone, the same number again; follow DI as channels are added; "
        "and compare by cross-validated linear discriminant analysis what the channels are worth that DI keeps.",
    )
    add_model(parser)
    add_data(parser)
    parser.add_argument("--layer", action="append", metavar="GROUP", help="a channel group; repeat for more (all)")
    parser.add_argument("--images", type=positive, default=1000, help="training images looked at (default 1000)")
    parser.add_argument("--rho", type=float, default=10.0, help="relative ridge of DI (default 10)")
    parser.add_argument("--seed", type=seed, default=0, help="of random orders and folds (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them (.png, .svg or .pdf)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..groups import trace_groups
    from ..holdout import split_holdout
    from ..reference import check_outputs, choose_groups, plot_validation, save_validation, validate_network

    check_outputs(args.json, args.plot)
    model, inputs = model_of(args)
    groups = choose_groups(trace_groups(model, inputs), args.layer)
    loader = split_holdout(data_of(args).train).scoring
    layers = validate_network(model, loader, groups, images=args.images, rho=args.rho, seed=args.seed)
    print_validation(layers)
    if args.json:
        save_validation(layers, args.json)
    if args.plot:
        plot_validation(layers, args.plot)
    return 0


def print_validation(layers: Sequence[LayerValidation]) -> None:
    """Identities, monotony and accuracies as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from ..reference import FRACTIONS, mean_accuracies

    console = Console()
    if not console.is_terminal:  # a file has no width to keep to
        console = Console(width=120)

    def table(*columns: str, title: str | None = None) -> Table:
        return Table(*columns, title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")

    proof = table("layer", "referee", "diplugin", "scikit-learn", "differ by", "never falls")
    for layer in layers:
        for place, identity in enumerate(layer.identities):
            name, falls = (layer.layer, "yes" if layer.non_decreasing else "NO") if place == 0 else ("", "")
            proof.add_row(name, identity.referee, f"{identity.ours:.6f}", f"{identity.theirs:.6f}",
                          f"{identity.relative_difference:.0e}", falls)  # fmt: skip
    console.print(proof)
    for layer in layers:
        counts = sorted({row.kept for row in layer.accuracies})
        found = {(row.criterion, row.kept): row.accuracy for row in layer.accuracies}
        rows = table("channels kept by", *(f"{count} of {layer.channels}" for count in counts),
                     title=f"{layer.layer}: LDA accuracy on held folds, {layer.images} images")  # fmt: skip
        for criterion in dict.fromkeys(row.criterion for row in layer.accuracies):
            rows.add_row(criterion, *(f"{found[criterion, count]:.1%}" for count in counts))
        console.print(rows)
    means = table("channels kept by", *(f"{fraction:.0%}" for fraction in FRACTIONS),
                  title=f"mean of {len(layers)} layers: LDA accuracy on held folds")  # fmt: skip
    for criterion, accuracies in mean_accuracies(layers).items():
        means.add_row(criterion, *(f"{accuracy:.1%}" for accuracy in accuracies))
    console.print(means)
    worst = max(layer.worst_difference for layer in layers)
    console.print(f"largest difference to scikit-learn: {worst:.0e} over {len(layers)} layers", highlight=False)
