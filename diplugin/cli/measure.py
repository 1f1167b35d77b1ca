"""`diplugin measure RUN`: time the final ONNX file of a run, here or on a device, and note it in the run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import positive


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("measure", help="time a run's final ONNX file, here or on a device")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="a run folder, or an ONNX file")
    parser.add_argument("--ssh", metavar="USER@HOST", help="on this device instead of here")
    parser.add_argument("--threads", type=positive, default=1, metavar="N")
    parser.add_argument("--python", default="python3", help="the interpreter on the device (python3)")
    parser.add_argument("--ssh-option", action="append", default=[], metavar="-oNAME=VALUE", help="passed on to ssh")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..latency.onnx_timing import measure_apart
    from ..latency.remote import Remote, measure_there

    path = args.run_folder / "model.onnx" if args.run_folder.is_dir() else args.run_folder
    if args.ssh:
        remote = Remote(args.ssh, python=args.python, options=tuple(args.ssh_option))
        timing, place = measure_there(remote, path, threads=args.threads), args.ssh
    else:
        timing, place = measure_apart(path, threads=args.threads), "here"
    memory = "" if timing.peak_memory_mb is None else f", peak memory of the process {timing.peak_memory_mb:.1f} MB"
    print(f"{path}: {timing.latency_ms:.4g} ms ({place}, {args.threads} thread{'s' if args.threads != 1 else ''}, "
          f"scatter {timing.cv:.1%}){memory}")  # fmt: skip
    if args.run_folder.is_dir():
        from ..latency.noted import note_measurement
        from ..report import write_report

        note_measurement(args.run_folder, timing, place)
        print(f"noted in {write_report(args.run_folder)}")
    return 0
