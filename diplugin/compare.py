"""Criteria side by side: one model, one set of images, one amount of work left, many ways to choose channels.

A *contender* (see `contenders`) says which channels leave so that the network does a given fraction of its MACs. All
contenders prune the same groups and see the same calibration images, on which BatchNorm is recalibrated; `compress`
repairs its networks by them instead. Accuracy is read at the end, on data that nobody chose by.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .accuracy import accuracy
from .boundary import GuardedLoader, guarded_forward, guarded_labels
from .contenders import Case, Contender, default_contenders
from .costs import layer_macs
from .errors import BudgetError, DataError, ModelError
from .features import CHUNK_SIZE, Forward, GetLabels, chunks, first_images, forward_inputs, labels_of
from .holdout import split_holdout
from .network import record_layers, trace_network
from .recovery import recalibrate_batchnorm
from .sources import DataSource
from .whole_files import write_text


@dataclass(frozen=True)
class Row:
    """One contender at one target: `macs` is the fraction reached, `accuracy` None if it was out of reach."""

    contender: str
    target: float
    macs: float | None
    params: float | None
    accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All rows, and the accuracy of the unpruned network as it is and with its BatchNorm recalibrated."""

    base_accuracy: float
    recalibrated_accuracy: float
    rows: tuple[Row, ...]
    judged: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def best(self, target: float, *, without: str = "\0") -> Row | None:
        """The most accurate row at a target among contenders whose names do not contain `without`."""
        rows = [r for r in self.rows if r.target == target and r.accuracy is not None and without not in r.contender]
        return max(rows, key=lambda r: r.accuracy or 0.0, default=None)

    def to_json(self) -> str:
        """JSON text of the whole comparison."""
        return json.dumps({**asdict(self), "rows": [asdict(row) for row in self.rows]}, indent=1)

    def save(self, path: str | Path) -> None:
        """Write the comparison as JSON."""
        write_text(path, self.to_json())


def compare(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    example_inputs: tuple[Any, ...],
    test_loader: Iterable[Any],
    fractions: Sequence[float] = (0.7, 0.5, 0.3),
    contenders: Sequence[Contender] | None = None,
    images: int = 1500,
    holdout: Iterable[Any] | None = None,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Prune a model by every contender to every fraction of its MACs and judge the results.

    Args:
        model: the trained network; it is not changed.
        loader: training data, batches of (inputs, labels); the first `images` of it calibrate everybody.
        example_inputs: positional inputs at batch 1.
        test_loader: what the pruned networks are judged on.
        fractions: of the unpruned network's MACs.
        contenders: None for `default_contenders()`.
        holdout: training images beyond the first, for contenders that choose by accuracy.
        tell: called with one line for every row.

    Raises:
        BudgetError: a fraction outside (0, 1).
        UserError: a model or data that cannot be used.
    """
    if not fractions or not all(0 < f < 1 for f in fractions):
        raise BudgetError(f"expected fractions of the MACs between 0 and 1, got {list(fractions)}")
    get_labels, forward = guarded_labels(get_labels), guarded_forward(forward)
    holdout = None if holdout is None else GuardedLoader(holdout)
    model = _thawed(model)
    kept = list(chunks(first_images(GuardedLoader(loader), images), CHUNK_SIZE))
    if not kept:
        raise DataError("expected a loader that yields training images, got an empty one")
    case = Case(model, example_inputs, trace_network(model, example_inputs), kept, holdout, get_labels, forward)
    if not case.trace.prunable:
        raise ModelError("expected a model with channels that can be removed, found none")
    judge = _judge(GuardedLoader(test_loader), get_labels, forward)
    recalibrated = recalibrate_batchnorm(copy.deepcopy(model), kept, images=images, forward=forward)
    base = judge(model), judge(recalibrated)
    tell(f"unpruned {base[0]:.2%}, recalibrated {base[1]:.2%}")
    rows: list[Row] = []
    for contender in contenders if contenders is not None else default_contenders():
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(seed)
            warnings.simplefilter("ignore")
            rows += _rows(contender, case, fractions, judge, tell)
    settings = {"images": images, "seed": seed, "fractions": list(fractions)}
    return Comparison(*base, tuple(rows), settings=settings)


def _thawed(model: nn.Module) -> nn.Module:
    """A copy in eval mode without frozen weights: torch-pruning would pass those over, and some criteria need grads."""
    model = copy.deepcopy(model).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return model


def _judge(loader: Iterable[Any], get_labels: GetLabels, forward: Forward) -> Callable[[nn.Module], float]:
    batches = list(loader)  # read from disk and normalised once, not once a row
    return lambda model: accuracy(model, batches, get_labels=get_labels, forward=forward)


def _rows(
    contender: Contender, case: Case, fractions: Sequence[float], judge: Callable[[nn.Module], float],
    tell: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    start = time.perf_counter()
    pruned = contender.prune(case, fractions)
    seconds = (time.perf_counter() - start) / len(fractions)
    rows = []
    for fraction in fractions:
        model = pruned.get(fraction)
        if model is None:
            rows.append(Row(contender.name, fraction, None, None, None, seconds))
            continue
        share = count_macs(model, case.inputs) / count_macs(case.model, case.inputs)
        params = _params(model) / _params(case.model)
        rows.append(Row(contender.name, fraction, share, params, judge(model), seconds))
    tell(f"{contender.name:32}" + "".join(f"{_percent(r.accuracy):>9}" for r in rows))
    return rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def count_macs(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Multiply-accumulates of a network as it is."""
    layers = record_layers(model, inputs)
    return sum(layer_macs(layer, layer.in_channels, layer.out_channels) for layer in layers if layer.op != "norm")


def _params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def compare_source(
    model: nn.Module, source: DataSource, *, example_inputs: tuple[Any, ...], test_images: int | None = None,
    only: str | None = None, seed: int = 0, **options: Any,
) -> Comparison:  # fmt: skip
    """`compare` on a named data source: a holdout is split off its training data, its test data judges.

    Without test data one half of the holdout judges, and contenders choose by the other.

    Args:
        test_images: judge on the first so many test images.
        only: contenders whose names contain this, or one of these words, separated by commas.

    Raises:
        DataError: no contender of that name, or too few images.
    """
    split = split_holdout(source.train, seed=seed)
    chosen_by, judged = split.holdout, source.test
    if judged is None:
        halves = split_holdout(split.holdout, 0.5, seed)
        chosen_by, judged = halves.holdout, halves.scoring
    if test_images is not None:
        judged = first_images(judged, test_images)
    chosen = _named(only or "")
    holdout = list(first_images(chosen_by, 2000))
    result = compare(model, split.scoring, example_inputs=example_inputs, test_loader=judged, contenders=chosen,
                     holdout=holdout, seed=seed, **options)  # fmt: skip
    return replace(result, judged="half of the training data's holdout" if source.test is None else "test data")


def _named(only: str) -> list[Contender]:
    """Contenders whose names contain the text, which may be a whole name with its comma, or one of its words."""
    known, text = default_contenders(), only.strip().lower()
    whole = any(text in contender.name.lower() for contender in known)
    words = [text] if whole else [word.strip() for word in text.split(",") if word.strip()]
    chosen = [c for c in known if any(word in c.name.lower() for word in words)]
    if not chosen:
        raise DataError(f"expected contenders among {'; '.join(c.name for c in known)}; got {only!r}")
    return chosen


def print_comparison(result: Comparison) -> None:
    """One table: contenders down, targets across, the best of a column in bold."""
    from rich.console import Console
    from rich.table import Table

    targets = list(dict.fromkeys(row.target for row in result.rows))
    table = Table(title=f"top-1 on {result.judged or 'the given data'}, unpruned {result.base_accuracy:.2%}")
    table.add_column("criterion")
    for target in targets:
        table.add_column(f"{target:.0%} MACs", justify="right")
    for name in dict.fromkeys(row.contender for row in result.rows):
        cells = []
        for target in targets:
            row = next(r for r in result.rows if (r.contender, r.target) == (name, target))
            best = result.best(target)
            cells.append(f"[bold]{_percent(row.accuracy)}[/bold]" if row == best else _percent(row.accuracy))
        table.add_row(name, *cells)
    Console().print(table)
