"""A run folder as plain data, checked once: what the page and the pictures are made from.

`config.json`, `plan.json` and `metrics.json` make a whole run; `scores.json`, `validate.json`, `bits.json` are
shown when they are there. A figure that a run did not take is None. Whatever is broken is one `PlanError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..plan import PruningPlan
from ..run_folder import CONFIG, METRICS, SCORES, read_json
from ..surgery import PLAN_FILE

STAGES = ("base", "pruned", "recovered", "quantized")
VALIDATION, BITS = "validate.json", "bits.json"


@dataclass(frozen=True)
class Stage:
    """Figures of the network at one point of the run; None where none was taken."""

    name: str
    figures: Mapping[str, float | None]

    def get(self, key: str) -> float | None:
        return self.figures.get(key)


@dataclass(frozen=True)
class BudgetResult:
    """A budget and what became of it, in the cost's own unit."""

    cost: str
    asked: float
    predicted: float | None
    measured: float | None
    met: bool | None


@dataclass(frozen=True)
class Step:
    """One step of a gradual strategy.

    Attributes:
        shares: cost name -> share of the unpruned network's, as predicted.
        cut: holdout accuracy right after the cut and its repair.
        taught: the same after the step's training; None where there was none.
    """

    number: int
    shares: Mapping[str, float]
    repair: str
    cut: float
    taught: float | None


@dataclass(frozen=True)
class Scores:
    """What scoring recorded, as fractions of label variance.

    Attributes:
        di: of every group's features.
        channels: the score of each of a group's root channels.
        left_alone: groups that cannot be pruned, and why.
    """

    di: Mapping[str, float]
    channels: Mapping[str, tuple[float, ...]]
    rho: float | None
    images: int | None
    left_alone: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """Everything a run folder says.

    Attributes:
        table: what the latency table says of itself (`table_info`), None if the run had none.
        measured_on: where the final network was timed after the run, None for the machine of the run. The unpruned
            network's time is left out then: it was taken elsewhere.
        bits: bit widths per layer and channel, as `quantize` records them.
        data, versions, config: as recorded, for the page's last section.
        steps: of a gradual strategy; empty for one shot.
    """

    folder: Path
    config: Mapping[str, Any]
    plan: PruningPlan
    stages: tuple[Stage, ...]
    budgets: tuple[BudgetResult, ...]
    seconds: Mapping[str, float]
    data: Any
    versions: Mapping[str, Any]
    seed: Any
    scores: Scores | None
    table: Mapping[str, Any] | None
    validation: Mapping[str, Any] | None
    bits: Mapping[str, Any] | None
    measured_on: str | None
    steps: tuple[Step, ...] = ()

    @property
    def base(self) -> Stage:
        return self.stages[0]

    @property
    def final(self) -> Stage:
        return self.stages[-1]

    def last(self, key: str, quantized: bool = True) -> float | None:
        """What the run ended with, None if that was not taken.

        Recovery changes no structure, so a pruned and a recovered network share what either lacks; quantization
        changes everything, so a quantized network's figures are its own. `quantized=False` asks for the network
        that was quantized.
        """
        if quantized and self.final.name == "quantized":
            return self.final.get(key)
        cut = [s for s in self.stages if s.name in ("pruned", "recovered")]
        return next((s.get(key) for s in reversed(cut) if s.get(key) is not None), None)


def read_run(folder: str | Path) -> Run:
    """Read and check a run folder.

    Raises:
        PlanError: no such folder, a run that never finished, or a file that is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PlanError(f"expected a run folder, there is no folder {folder}")
    missing = [name for name in (CONFIG, PLAN_FILE, METRICS) if not (folder / name).is_file()]
    if missing:
        raise PlanError(f"expected a finished run folder, {folder} lacks {', '.join(missing)}; finish it with --resume")
    metrics = read_json(folder / METRICS)
    try:
        return _run(folder, read_json(folder / CONFIG), metrics)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PlanError(f"expected whole figures in {folder}, got {type(error).__name__}: {error}") from error


def _run(folder: Path, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> Run:
    place = metrics.get("measured_on")
    elsewhere = None if place is None or place == "here" else str(place)
    stages = tuple(Stage(n, _figures(metrics[n], n, elsewhere)) for n in STAGES if metrics.get(n) is not None)
    if not stages or stages[0].name != "base":
        raise PlanError(f"expected figures of the unpruned network ('base') in {folder / METRICS}, got none")
    return Run(
        folder=folder,
        config=config,
        plan=PruningPlan.load(folder / PLAN_FILE),
        stages=stages,
        budgets=tuple(_budget(b) for b in metrics.get("budgets") or ()),
        seconds={str(k): _number(v, k) for k, v in _mapping(metrics.get("seconds"), "seconds").items()},
        data=metrics.get("data"),
        versions=_mapping(metrics.get("versions"), "versions"),
        seed=metrics.get("seed"),
        scores=_scores(folder / SCORES),
        table=_mapping(metrics.get("latency_table"), "latency_table") or None,
        validation=_optional(folder / VALIDATION),
        bits=_allocation(folder / BITS),
        measured_on=elsewhere,
        steps=tuple(_step(s) for s in metrics.get("steps") or ()),
    )


def _figures(section: Any, name: str, elsewhere: str | None) -> dict[str, float | None]:
    figures = {str(k): _optional_number(v, f"{name}.{k}") for k, v in _mapping(section, name).items()
               if v is None or isinstance(v, (int, float))}  # fmt: skip
    if elsewhere is not None and name == "base" and "latency_ms_measured" in figures:
        figures["latency_ms_measured"] = None
    return figures


def _budget(entry: Any) -> BudgetResult:
    entry = _mapping(entry, "budgets")
    met = entry.get("met")
    if met is not None and not isinstance(met, bool):
        raise TypeError(f"budgets.met is {met!r}, neither true nor false")
    return BudgetResult(str(entry["cost"]), _number(entry["asked"], "budgets.asked"),
                        _optional_number(entry.get("predicted"), "budgets.predicted"),
                        _optional_number(entry.get("measured"), "budgets.measured"), met)  # fmt: skip


def _step(entry: Any) -> Step:
    entry = _mapping(entry, "steps")
    costs = {str(n): _mapping(c, f"steps.{n}") for n, c in _mapping(entry["costs"], "steps.costs").items()}
    numbers = {n: (_number(c["predicted"], f"steps.{n}"), _number(c["base"], f"steps.{n}")) for n, c in costs.items()}
    shares = {n: predicted / base for n, (predicted, base) in numbers.items() if base}
    return Step(int(_number(entry["step"], "steps.step")), shares, str(entry["repair"]),
                _number(entry["accuracy_cut"], "steps.accuracy_cut"),
                _optional_number(entry.get("accuracy_taught"), "steps.accuracy_taught"))  # fmt: skip


def _scores(path: Path) -> Scores | None:
    data = _optional(path)
    if data is None:
        return None
    channels = {str(n): tuple(_number(v, f"scores.{n}") for v in values)
                for n, values in _mapping(data.get("scores"), "scores").items()}  # fmt: skip
    di = {str(n): _number(v, f"di.{n}") for n, v in _mapping(data.get("di"), "di").items()}
    rho, images = _optional_number(data.get("rho"), "rho"), _optional_number(data.get("images"), "images")
    left_alone = {str(n): str(note) for n, note in _mapping(data.get("left_alone"), "left_alone").items()}
    return Scores(di, channels, rho, None if images is None else int(images), left_alone)


def _allocation(path: Path) -> dict[str, Any] | None:
    data = _optional(path)
    for layer, widths in _mapping((data or {}).get("bits"), "bits").items():
        if not isinstance(widths, list) or not all(isinstance(b, int) and 0 <= b <= 32 for b in widths):
            raise ValueError(f"bits of {layer} are {widths!r:.60}, not a list of bit widths")
    return data


def _optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None


def _mapping(section: Any, name: str) -> Mapping[str, Any]:
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise TypeError(f"{name} is a {type(section).__name__}, not an object")
    return section


def _number(number: Any, name: str) -> float:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} is {number!r}, not a number")
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, not a finite number")
    return float(number)


def _optional_number(number: Any, name: str) -> float | None:
    return None if number is None else _number(number, name)
