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
    parser.add_argument("--threads", type=positive, metavar="N", help="default: those of the run's latency table, or 1")
    parser.add_argument("--python", default="python3", help="the interpreter on the device (python3)")
    parser.add_argument("--ssh-option", action="append", default=[], metavar="-oNAME=VALUE", help="passed on to ssh")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..latency.noted import HERE, note_measurement, planned_dtype, planned_elsewhere, planned_threads
    from ..latency.onnx_timing import measure_apart
    from ..latency.remote import Remote, measure_there

    metrics = _checked(args.run_folder) if args.run_folder.is_dir() else {}
    path = args.run_folder / "model.onnx" if metrics else args.run_folder
    threads, dtype = args.threads or planned_threads(metrics), planned_dtype(metrics)
    if args.ssh:
        remote = Remote(args.ssh, python=args.python, options=tuple(args.ssh_option))
        timing, place = measure_there(remote, path, threads=threads, dtype=dtype), args.ssh
    else:
        timing, place = measure_apart(path, threads=threads, dtype=dtype), HERE
    memory = "" if timing.peak_memory_mb is None else f", peak memory of the process {timing.peak_memory_mb:.1f} MB"
    form = ", in 8 bits as its table" if dtype == "int8" else ""
    print(f"{path}: {timing.latency_ms:.4g} ms ({place}, {threads} thread{'s' if threads != 1 else ''}{form}, "
          f"scatter {timing.cv:.1%}){memory}")  # fmt: skip
    if timing.unstable:
        print("note: the device was throttled or never came to rest: measure again once it is cool and quiet")
    if metrics:
        from ..report import write_report

        note_measurement(args.run_folder, timing, place)
        print(f"noted in {write_report(args.run_folder)}")
        planned = planned_elsewhere(metrics)
        if planned is not None and place == HERE:
            print(
                f"the run was planned for {planned}: its latency budget is not judged by this time, measure with --ssh"
            )
    return 0


def _checked(folder: Path) -> dict[str, Any]:
    """The metrics of a run that can take a measurement; seconds of timing are not spent on another."""
    from ..report import read_run
    from ..run_folder import METRICS, cut_figures, read_json

    read_run(folder)
    metrics = read_json(folder / METRICS)
    cut_figures(metrics, folder)
    return metrics
