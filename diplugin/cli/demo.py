"""`diplugin demo`: the main job on data and a network that are already here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import Teller, print_metrics


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help="profile, prune, recover, export and report on scikit-learn's digits")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: a fresh one under runs/)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..demo import Demo
    from ..run_folder import next_numbered, refuse_held

    out = args.out or next_numbered("runs", "demo")
    refuse_held(out)
    with Teller() as tell:
        result = Demo().run(out, tell)
    print_metrics(result.metrics)
    print(f"open {out / 'report.html'}")
    return 0
