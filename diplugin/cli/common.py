"""Arguments that several commands share, and how they talk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..sources import DataSource


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL with its weights and input shape."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME or package.module:callable, which returns the network",
    )
    parser.add_argument("--weights", metavar="FILE", type=Path, help="safetensors file with the trained weights")
    parser.add_argument("--example-shape", metavar="N,C,H,W", required=True, help="shape of one input, e.g. 1,3,32,32")


def add_data(parser: argparse.ArgumentParser) -> None:
    """DATA and its batch size."""
    parser.add_argument(
        "data", metavar="DATA",
        help="digits, cifar10:DIR, fashion-mnist:DIR, imagefolder:DIR (normalised as ImageNet, gray for a model of one "
        "channel) or package.module:callable, which returns a DataLoader or a DataSource",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=positive, default=128, metavar="N", help="images a batch (default 128)")


def positive(text: str) -> int:
    """argparse type: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def seed(text: str) -> int:
    """argparse type: an integer that every generator takes."""
    from ..configuration import LARGEST_SEED, is_seed

    value = int(text)
    if not is_seed(value):
        raise argparse.ArgumentTypeError(f"expected 0 to {LARGEST_SEED}, got {value}")
    return value


def example_shape(text: str) -> tuple[int, ...]:
    """`1,3,32,32` as numbers.

    Raises:
        ModelError: anything else.
    """
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ModelError(f"expected --example-shape as positive numbers such as 1,3,32,32, got {text!r}")
    return shape


def model_of(args: argparse.Namespace) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model that the arguments name, in eval mode, and example inputs for it."""
    import torch

    from ..sources import load_model

    shape = example_shape(args.example_shape)
    model = load_model(args.model, args.weights).eval()
    try:
        return model, (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
    except (RuntimeError, TypeError, MemoryError) as error:
        raise ModelError(f"expected an --example-shape that fits into memory, got {args.example_shape}") from error


def data_of(args: argparse.Namespace) -> DataSource:
    """The data that the arguments name."""
    from ..sources import load_data

    return load_data(args.data, example_shape=example_shape(args.example_shape), batch_size=args.batch_size)


class Teller:
    """Prints one line a stage, with a spinner beneath it when a person is watching."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._status: Any = None

    def __enter__(self) -> Teller:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("working")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, line: str) -> None:
        if not self._quiet:
            print(line, flush=True)


def print_metrics(metrics: dict[str, Any]) -> None:
    """The before/after table and the budgets of a run."""
    from rich.console import Console
    from rich.table import Table

    stages = [s for s in ("base", "pruned", "recovered", "quantized") if s in metrics]
    table = Table(title=None)
    table.add_column("")
    for stage in stages:
        table.add_column("unpruned" if stage == "base" else stage, justify="right")
    for key, label, form in _ROWS:
        values = [metrics[stage].get(key) for stage in stages]
        if any(value is not None for value in values):
            table.add_row(label, *("–" if v is None else form(v) for v in values))
    console = Console()
    console.print(table)
    for budget in metrics.get("budgets", []):
        console.print(_budget_line(budget), highlight=False, markup=False, soft_wrap=True)


def _budget_line(budget: dict[str, Any]) -> str:
    """A budget in its own unit, with its verdict."""
    from ..report.format import value

    asked, predicted, measured = (
        None if budget[key] is None else value(budget["cost"], budget[key]).replace("\u00a0", " ")
        for key in ("asked", "predicted", "measured")
    )
    verdict = "met" if budget["met"] else "NOT met"
    found = "not measured" if measured is None else f"measured {measured}"
    return f"budget {budget['cost']} <= {asked}: predicted {predicted}, {found}: {verdict}"


_ROWS = (
    ("accuracy", "accuracy", lambda v: f"{v:.2%}"),
    ("macs", "MACs", lambda v: f"{v / 1e6:.2f} M"),
    ("params", "parameters", lambda v: f"{v / 1e3:.1f} k"),
    ("memory_mb", "peak activations", lambda v: f"{v:.3f} MB"),
    ("latency_ms_predicted", "latency predicted", lambda v: f"{v:.3f} ms"),
    ("latency_ms_measured", "latency measured", lambda v: f"{v:.3f} ms"),
    ("size_mb", "ONNX file", lambda v: f"{v:.3f} MB"),
)
