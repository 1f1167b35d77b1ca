"""`diplugin report`: the page of a run folder, made again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report", help="write report.html of a run folder again",
        description="The page is one file that needs no network and runs no script.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="also save the pictures there, as SVG")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..report import figures, write_report

    print(write_report(args.folder))
    if args.figures is not None:
        for path in figures(args.folder, args.figures):
            print(path)
    return 0
