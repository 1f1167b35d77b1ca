"""`diplugin score`: how much label information every channel of a model carries."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import add_data, add_model, data_of, model_of, positive


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("score", help="print DI per channel group")
    add_model(parser)
    add_data(parser)
    parser.add_argument("--rho", type=float, default=10.0, help="relative ridge of DI (default 10)")
    parser.add_argument("--images", type=positive, default=2000, help="training images scored (default 2000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every channel's score")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..holdout import split_holdout
    from ..network import trace_network
    from ..scoring import score_groups
    from ..strategies import first_images

    model, inputs = model_of(args)
    split = split_holdout(data_of(args).train)
    trace = trace_network(model, inputs)
    scores = score_groups(model, first_images(split.scoring, args.images), trace.groups, rho=args.rho)
    for group in trace.groups:
        if group.prunable:
            values = scores.scores[group.name]
            print(f"{group.name:40s} {group.channels:5d} channels  DI {scores.di[group.name]:.4f}  "
                  f"loss per channel {values.min():.2e} to {values.max():.2e}")  # fmt: skip
        else:
            print(f"{group.name:40s} {group.channels:5d} channels  left alone: {group.note}")
    if args.json:
        data = {"di": dict(scores.di), "scores": {n: v.tolist() for n, v in scores.scores.items()},
                "rho": scores.rho, "images": scores.images}  # fmt: skip
        args.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return 0
