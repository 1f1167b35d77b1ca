"""`diplugin tables list|show|check|diff|plot|estimate`: look at latency tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .common import model_of, positive


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("tables", help="list, show, check, compare, draw and estimate latency tables")
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    steps.add_parser("list", help="tables that come with the package").set_defaults(run=run_list)
    show = steps.add_parser("show", help="what a table holds")
    show.add_argument("table", metavar="TABLE", help="a file or a shipped name")
    show.add_argument("--rows", type=positive, default=20, metavar="N", help="families of operators to list (20)")
    show.set_defaults(run=run_show)
    check = steps.add_parser("check", help="whether a table's numbers can be true")
    check.add_argument("table", metavar="TABLE", help="a file or a shipped name")
    check.add_argument("--device", help="expect this device, in the table's own words")
    check.set_defaults(run=run_check)
    diff = steps.add_parser("diff", help="compare two tables")
    diff.add_argument("one", metavar="TABLE", help="a file or a shipped name")
    diff.add_argument("other", metavar="TABLE", help="another, which is divided by the first")
    diff.set_defaults(run=run_diff)
    plot = steps.add_parser("plot", help="draw the staircase of a layer")
    plot.add_argument("table", metavar="TABLE", help="a file or a shipped name")
    plot.add_argument("--of", default="", metavar="WORDS", help='words of its description, such as "k3x3 @8x8"')
    plot.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .png, .svg or .pdf to draw")
    plot.set_defaults(run=run_plot)
    _add_estimate(steps)


def _add_estimate(steps: Any) -> None:
    parser = steps.add_parser("estimate", help="latency without the device: a fitted model, with its error band")
    parser.add_argument("--device", required=True, metavar="NAME",
                        help="jetson-nano-cpu, jetson-nano-gpu or raspberry-pi-4")  # fmt: skip
    parser.add_argument("--model", required=True, metavar="MODEL", help="as for the other commands")
    parser.add_argument("--weights", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--example-shape", required=True, metavar="N,C,H,W", help="shape of one input")
    parser.add_argument("--json", action="store_true", help="print {latency_ms, low, high}")
    parser.add_argument("--points", type=positive, default=8, metavar="N", help="about this many widths a group (8)")
    parser.add_argument("--out", type=Path, metavar="TABLE.json", help="write an estimated table for this model")
    parser.set_defaults(run=run_estimate)


def run_list(args: argparse.Namespace) -> int:
    from ..tables import LatencyTable
    from ..tables.file_format import shipped_tables

    for name in shipped_tables():
        table = LatencyTable.load(name)
        what = f"{len(table.entries)} {table.dtype} operators, {table.origin}"
        print(f"{name}: {what}, {table.device}, {table.setting.text}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    from ..latency.staircase import staircases
    from ..tables import LatencyTable

    table = LatencyTable.load(args.table)
    print(f"{table.name}: {table.origin} on {table.device}{' (EMULATED)' if table.emulated else ''}")
    print(f"{table.setting.text}; steps of {table.alignment.step}, plateaus of {table.alignment.plateau} channels; "
          f"{table.overhead_ms * 1e3:.1f} µs a call; {table.quality}")  # fmt: skip
    families = staircases(table)
    print(f"{len(table.entries)} {table.dtype} operators in {len(families)} families, {len(table.nets)} whole nets")
    for _, keys in families[: args.rows]:
        times = [table.by_key[key].latency_ms for key in keys]
        print(f"  {len(keys):5d} x {keys[-1].text}: {min(times):.4g} to {max(times):.4g} ms")
    for name, value in table.provenance.items():
        print(f"  {name}: {value}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    from ..errors import TableError
    from ..latency.quality import findings
    from ..tables import LatencyTable

    table = LatencyTable.load(args.table)
    if args.device:
        table.check_device(args.device)
    found = findings(table)
    for finding in found:
        print(f"{'fault' if finding.fatal else 'note'}: {finding.text}")
    fatal = [finding for finding in found if finding.fatal]
    if fatal:
        raise TableError(f"table {table.name!r} is not to be trusted: {fatal[0].text}")
    print(f"{table.name}: {len(table.entries)} operators, sound")
    return 0


def run_diff(args: argparse.Namespace) -> int:
    from ..latency.quality import diff_tables
    from ..tables import LatencyTable

    one, other = LatencyTable.load(args.one), LatencyTable.load(args.other)
    diff = diff_tables(one, other)
    print(f"{one.name}: {one.device}, {one.setting.text}\n{other.name}: {other.device}, {other.setting.text}")
    print(f"{len(diff.ratios)} operators in both, {diff.only_one} only in the first, {diff.only_other} in the second")
    ordered = sorted(diff.ratios.items(), key=lambda item: item[1])
    if ordered:
        print(f"second / first: median {ordered[len(ordered) // 2][1]:.3f}")
    for key, ratio in dict([*ordered[:3], *ordered[-3:]]).items():
        print(f"  {ratio:8.3f}  {key.text}")
    if diff.copied:
        print(f"fault: {diff.equal} times are equal to the last digit: one of the tables is a copy")
    return 0


def run_plot(args: argparse.Namespace) -> int:
    from ..latency.staircase import plot_staircase
    from ..tables import LatencyTable

    print(plot_staircase(LatencyTable.load(args.table), args.out, args.of.split()))
    return 0


def run_estimate(args: argparse.Namespace) -> int:
    from ..latency.estimate import estimate, estimated_table
    from ..network import trace_network

    model, inputs = model_of(args)
    trace = trace_network(model, inputs, verify=args.out is not None)
    result = estimate(args.device, trace)
    if args.json:
        print(json.dumps({"latency_ms": result.latency_ms, "low": result.low, "high": result.high}))
    else:
        print(result.text)
    if args.out is not None:
        print(estimated_table(args.device, trace, points=args.points).save(args.out))
    return 0
