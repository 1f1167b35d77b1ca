"""`diplugin export`: the pruned network of a run folder as ONNX, made again and checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export", help="write the pruned network of a run folder as ONNX",
        description="Rebuilds the network from plan.json and weights.safetensors, exports it, and writes the file "
        "only if ONNX Runtime gives the outputs that torch gives.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the ONNX file to write")
    parser.add_argument(
        "--model", metavar="MODEL",
        help="the unpruned architecture, as given to compress: package.module:callable, torchvision:NAME or timm:NAME; "
        "only needed where the run does not record it",
    )  # fmt: skip
    parser.add_argument("--fixed-batch", action="store_true", help="fix the batch at the example's, usually 1")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..export import export_run
    from ..sources import load_model

    model = load_model(args.model or _recorded_model(args.folder))
    check = export_run(args.folder, model, args.out, dynamic_batch=not args.fixed_batch)
    batch = "any batch size" if check.dynamic_batch else "one batch size"
    print(f"{check.path}: {check.size_mb:.3f} MB, {batch}, "
          f"ONNX Runtime and torch differ by {check.max_abs_difference:.1e} at most")  # fmt: skip
    return 0


def _recorded_model(folder: Path) -> str:
    from ..errors import UserError
    from ..run_folder import CONFIG, read_json

    source = read_json(folder / CONFIG).get("source")
    if not isinstance(source, str):
        raise UserError(f"expected --model MODEL as it was given to compress, {folder} does not record it")
    return source
