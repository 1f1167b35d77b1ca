"""`diplugin profile here|plan|run|ssh|finish`: from a model to a latency table of a device."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import add_model, model_of, positive


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("profile", help="measure a device: here, or plan a bundle, run it there, finish")
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True)
    _add_here(steps)
    _add_plan(steps)
    _add_run(steps)
    _add_ssh(steps)
    _add_finish(steps)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", type=positive, default=8, metavar="N", help="about this many widths a group (8)")
    parser.add_argument("--nets", type=positive, default=16, metavar="N", help="pruned nets to calibrate on (16)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="threads of the runtime (1)")
    parser.add_argument("--name", help="the table's name (that of the file)")


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float32", "int8"), default="float32",
                        help="numbers that the network is timed in (float32)")  # fmt: skip


def _add_here(steps: Any) -> None:
    parser = steps.add_parser("here", help="plan, run and finish on this machine")
    add_model(parser)
    _add_grid(parser)
    parser.add_argument("--runtime", choices=("onnxruntime", "torch", "torch-cuda"), default="onnxruntime",
                        help="what runs the network (onnxruntime)")  # fmt: skip
    _add_dtype(parser)
    parser.add_argument("--seconds", type=positive, default=120, metavar="S", help="spend about this long (120)")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="keep the journal, and go on with it")
    parser.add_argument("--out", type=Path, required=True, metavar="TABLE.json", help="the table to write")
    parser.set_defaults(run=run_here)


def _add_plan(steps: Any) -> None:
    parser = steps.add_parser("plan", help="write one file that runs on the device with python3 alone")
    add_model(parser)
    _add_grid(parser)
    parser.add_argument("--step", type=positive, default=8, metavar="N", help="widths are multiples of it (8)")
    parser.add_argument("--runtime", choices=("onnxruntime", "trtexec"), default="onnxruntime",
                        help="what runs the network there (onnxruntime)")  # fmt: skip
    _add_dtype(parser)
    parser.add_argument("--net-ms", type=float, default=0.0, metavar="MS",
                        help="the unpruned net's time on the device, to foresee how long the bundle takes")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE.pyz", help="the file to write")
    parser.set_defaults(run=run_plan)


def _add_run(steps: Any) -> None:
    parser = steps.add_parser("run", help="run a bundle on this machine, or go on with it")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="as `profile plan` wrote it")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="default: the bundle's name with .jsonl")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run_run)


def _add_ssh(steps: Any) -> None:
    parser = steps.add_parser("ssh", help="copy a bundle to a device, run it there and bring the journal back")
    parser.add_argument("host", metavar="USER@HOST", help="as ssh knows it: your ~/.ssh/config counts")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="as `profile plan` wrote it")
    parser.add_argument("--journal", type=Path, metavar="FILE", help="default: the bundle's name with .jsonl")
    parser.add_argument("--python", default="python3", help="the interpreter there (python3)")
    parser.add_argument("--folder", default="", help="where on the device (a folder of its own in the home directory)")
    parser.add_argument("--ssh-option", action="append", default=[], metavar="-oNAME=VALUE", help="passed on to ssh")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run_ssh)


def _add_finish(steps: Any) -> None:
    parser = steps.add_parser("finish", help="turn a bundle and its journal into a table")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="as `profile plan` wrote it")
    parser.add_argument("journal", type=Path, metavar="JOURNAL", help="what the bundle wrote on the device, .jsonl")
    parser.add_argument("--name", default="", help="the table's name (the plan's)")
    parser.add_argument("--device", default="", help="the device in words (what it said about itself)")
    parser.add_argument("--out", type=Path, required=True, metavar="TABLE.json", help="the table to write")
    parser.set_defaults(run=run_finish)


def run_here(args: argparse.Namespace) -> int:
    from ..latency import device, profile_here

    model, inputs = model_of(args)
    runtime = None
    if args.runtime != "onnxruntime":
        from ..latency.torch_runtime import TorchRuntime, torch_setting

        runtime = TorchRuntime(torch_setting("cuda" if args.runtime == "torch-cuda" else "cpu", args.threads))
    table = profile_here(
        model, inputs, runtime=runtime, name=args.name or args.out.stem, threads=args.threads, budget_s=args.seconds,
        points=args.points, nets=args.nets, dtype=args.dtype, journal=args.journal, out=args.out,
        progress=device.progress_line(sys.stderr),
    )  # fmt: skip
    return _tell(table, args.out)


def run_plan(args: argparse.Namespace) -> int:
    from ..latency.plan import estimate_seconds, make_plan, runtime_setting
    from ..network import trace_network
    from ..tables import Alignment

    model, inputs = model_of(args)
    trace = trace_network(model, inputs)
    plan = make_plan(
        model, inputs, trace, name=args.name or args.out.stem, setting=runtime_setting(args.threads, args.runtime),
        alignment=Alignment(args.step, args.step), points=args.points, nets=args.nets, dtype=args.dtype,
    )  # fmt: skip
    path = plan.save(args.out)
    kinds = {kind: plan.count(kind) for kind in ("entry", "edge", "probe", "net")}
    print(f"{path}: {kinds['entry']} operators, {kinds['edge']} edges, {kinds['probe']} probes, {kinds['net']} nets; "
          f"{path.stat().st_size / 1e6:.1f} MB")  # fmt: skip
    if args.net_ms > 0:
        print(f"about {estimate_seconds(plan, trace, args.net_ms):.0f} s on a device that runs the unpruned net in "
              f"{args.net_ms:g} ms; --points {max(2, args.points // 2)} makes it shorter")  # fmt: skip
    print(f"on the device: python3 {path.name}; then here: diplugin profile finish {path} {path.stem}.jsonl --out ...")
    return 0


def run_run(args: argparse.Namespace) -> int:
    from ..latency import device, load_bundle
    from ..latency.local import run_bundle

    journal = args.journal or Path(args.bundle.stem + ".jsonl")
    done = run_bundle(load_bundle(args.bundle), journal, None if args.quiet else device.progress_line(sys.stderr))
    print(f"{len(done.rows)} rows in {journal}")
    return 0


def run_ssh(args: argparse.Namespace) -> int:
    from ..latency.remote import Remote, run_bundle_there

    journal = args.journal or Path(args.bundle.stem + ".jsonl")
    remote = Remote(args.host, python=args.python, folder=args.folder, options=tuple(args.ssh_option))
    rows = run_bundle_there(remote, args.bundle, journal, None if args.quiet else sys.stderr)
    print(f"{rows} rows in {journal}")
    return 0


def run_finish(args: argparse.Namespace) -> int:
    from ..latency import finish, load_bundle

    table = finish(load_bundle(args.bundle).plan, args.journal, name=args.name, device_name=args.device)
    table.save(args.out)
    return _tell(table, args.out)


def _tell(table: Any, path: Path) -> int:
    what = f"{len(table.entries)} {table.dtype} operators on {table.device}"
    print(f"{path}: {what}, {table.setting.text}; {table.quality}")
    from ..latency.quality import findings

    for finding in findings(table):
        print(f"note: {finding.text}")
    return 0
