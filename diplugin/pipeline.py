"""The main job: a model, data and budgets become a smaller model with its proof.

    split → judge → trace → score → search ⇄ time → cut → recover → (quantize) → export → report

Each arrow is one function of a layer below; this file only carries data from one to the next, keeps checkpoints and
writes down what was measured. Where the latency table is this very machine's, the cut network is timed before any
effort is spent on recovering it, and the search is told to aim lower until the budget holds as measured.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .accuracy import accuracy
from .costs import Budget, CostModel, PeakActivationMemory, macs, params
from .costs.latency import LatencyCost
from .errors import BudgetError, DataError, DipluginError, ModelError
from .features import Forward, GetLabels, device_of, forward_inputs, labels_of
from .groups import first_line
from .holdout import Split, split_holdout
from .network import NetworkTrace, trace_network
from .plan import PlannedCost, PruningPlan
from .recovery import REPAIRS, EpochReport, FineTuning, Repair, train
from .report import table_info, write_report
from .run_folder import METRICS, ONNX, REPORT, SCORES, RunFolder
from .scoring import GroupScores
from .search import SearchLimits
from .strategies import OneShot
from .surgery import PLAN_FILE, WEIGHTS_FILE, apply_plan, load_weights, read_weights, save_pruned
from .tables import LatencyTable
from .taps import AfterActivation, Tap

_TIMING_ATTEMPTS = 4
_PACKAGES = ("diplugin", "torch", "torch-pruning", "onnx", "onnxruntime", "numpy", "scikit-learn")

Tell = Callable[[str], None]


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` gives back.

    Attributes:
        model: the pruned (and recovered) network, in eval mode.
        plan: what was kept.
        metrics: what `metrics.json` holds.
        folder: the run folder; None if none was asked for.
        scores: DI of every group.
        quantized: the quantized network's result, if bits were asked for.
    """

    model: nn.Module
    plan: PruningPlan
    metrics: dict[str, Any]
    folder: Path | None
    scores: GroupScores
    quantized: Any = None


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    example_inputs: tuple[Any, ...],
    budgets: Sequence[Budget],
    latency_table: LatencyTable | None = None,
    recovery: FineTuning | None = None,
    bits: Any = None,
    out: str | Path | None = None,
    test_loader: Iterable[Any] | None = None,
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rho: float = 10.0,
    tap: Tap | None = None,
    limits: SearchLimits | None = None,
    repairs: Sequence[Repair] = REPAIRS,
    images: int = 2000,
    holdout: float = 0.1,
    seed: int = 0,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
    resume: bool = False,
    tell: Tell | None = None,
) -> CompressionResult:
    """Prune a network to its budgets, recover it, export it and write down what was measured.

    Args:
        model: the trained network; it is not changed.
        loader: training data, batches of (inputs, labels); a holdout is split off it.
        example_inputs: positional inputs at batch 1, a tuple of tensors.
        budgets: limits, each on `macs`, `params`, `memory_mb`, or `latency_ms` (which needs a table).
        latency_table: of the target device.
        recovery: `FineTuning` or `Distillation`; None takes no gradient step, the repairs still run.
        bits: settings of `diplugin.quantize`; None leaves the weights in float.
        out: run folder, new or empty; None writes nothing.
        test_loader: data that is read once, at the end, to judge by; None judges on the holdout.
        augment: varies a batch of training images [N, ...] while fine-tuning.
        rho, tap: of DI.
        limits: floor and alignment of the widths.
        repairs: what is tried on the cut network, without a gradient step; the holdout chooses.
        images: training images used for scores and repairs.
        holdout: fraction of the training data set aside.
        seed: of every random choice.
        resume: go on with a run that was killed.
        tell: called with one line for every stage.

    Raises:
        UserError: input that cannot be used; the message says what was expected.
        InfeasibleBudget: no structure within reach meets the budgets.
    """
    strategy = OneShot(rho, tap or AfterActivation(), limits or SearchLimits(), tuple(repairs), images, get_labels, forward)
    config = _config(model, budgets, latency_table, recovery, bits, strategy, holdout, seed, test_loader is not None)
    if not budgets:
        raise BudgetError("expected a budget such as macs=0.5, got none")
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(out if out is not None else Path(scratch) / "run", config, resume=resume)
        try:
            with _seeded(seed), _warnings_logged(folder):
                torch.manual_seed(seed)
                run = _Run(folder, strategy, model, split_holdout(loader, holdout, seed), test_loader, example_inputs,
                           tuple(budgets), latency_table, recovery, bits, augment, seed, tell or (lambda _: None))
                result = run.result()
        except DipluginError:
            folder.abandon()
            raise
    return result if out is not None else replace(result, folder=None)


@dataclass
class _Run:
    """One compression on its way; every method is a stage."""

    folder: RunFolder
    strategy: OneShot
    model: nn.Module
    split: Split
    test: Iterable[Any] | None
    inputs: tuple[Any, ...]
    budgets: tuple[Budget, ...]
    table: LatencyTable | None
    recovery: FineTuning | None
    bits: Any
    augment: Callable[[torch.Tensor], torch.Tensor] | None
    seed: int
    tell: Tell
    seconds: dict[str, float] = field(default_factory=dict)

    def result(self) -> CompressionResult:
        base_model = copy.deepcopy(self.model).eval()
        trace, costs = self.trace(base_model)
        metrics: dict[str, Any] = {"base": self.judge_base(base_model, costs)}
        scores = self.score(base_model, trace)
        plan = self.search(base_model, trace, scores, costs)
        pruned = self.cut(base_model, trace, plan)
        metrics["pruned"] = self.figures(pruned, plan)
        self.tell(f"pruned: accuracy {metrics['pruned']['accuracy']:.2%} before any training")
        if self.recovery is not None:
            pruned = self.recover(pruned, base_model)
            metrics["recovered"] = self.figures(pruned, plan)
            self.tell(f"recovered: accuracy {metrics['recovered']['accuracy']:.2%}")
        with self.stage("export"):
            save_pruned(pruned, plan, self.folder.path)
            last = metrics["recovered" if self.recovery is not None else "pruned"]
            last.update(self.export(pruned, ONNX))
        quantized = self.quantize(pruned, base_model, plan, metrics)
        self.finish(metrics, pruned, plan)
        return CompressionResult(pruned.eval(), plan, metrics, self.folder.path, scores, quantized)

    # ------------------------------------------------------------------------------------------- stages

    def trace(self, model: nn.Module) -> tuple[NetworkTrace, list[CostModel]]:
        with self.stage("trace"):
            inputs = tuple(x.to(device_of(model)) if isinstance(x, torch.Tensor) else x for x in self.inputs)
            self.inputs = inputs
            trace = trace_network(model, inputs)
            costs: list[CostModel] = [macs(trace), params(trace), PeakActivationMemory(trace)]
            if self.table is not None:
                costs.append(LatencyCost(trace, self.table))
        self.tell(f"traced: {len(trace.prunable)} of {len(trace.groups)} channel groups can be pruned")
        return trace, costs

    def judge_base(self, model: nn.Module, costs: Sequence[CostModel]) -> dict[str, Any]:
        with self.stage("judge"):
            figures = {"accuracy": self.accuracy(model)}
            figures.update({_metric_name(cost): cost.base for cost in costs})
            with tempfile.TemporaryDirectory() as scratch:
                figures.update(self.export(model, Path(scratch) / ONNX))
        self.tell(f"unpruned: accuracy {figures['accuracy']:.2%}, {figures['macs'] / 1e6:.1f} M MACs")
        return figures

    def score(self, model: nn.Module, trace: NetworkTrace) -> GroupScores:
        with self.stage("score"):
            scores = self.strategy.score(model, self.split.scoring, trace)
            self.folder.write_json(SCORES, {
                "di": dict(scores.di), "rho": scores.rho, "images": scores.images,
                "scores": {name: values.tolist() for name, values in scores.scores.items()},
                "left_alone": {g.name: g.note for g in trace.groups if not g.prunable},
            })  # fmt: skip
        self.tell(f"scored: DI of {len(scores.di)} groups on {scores.images} images")
        return scores

    def search(
        self, model: nn.Module, trace: NetworkTrace, scores: GroupScores, costs: Sequence[CostModel]
    ) -> PruningPlan:
        path = self.folder.path / PLAN_FILE
        if path.exists():
            return PruningPlan.load(path)
        with self.stage("search"):
            aims = tuple(self._aim(budget, costs) for budget in self.budgets)
            plan = self.strategy.search(trace, scores, costs, aims)
            if self.timed_here:
                plan = self._search_by_clock(model, trace, scores, costs, aims, plan)
            plan.save(path)
        shares = ", ".join(f"{name} {cost.fraction:.0%}" for name, cost in plan.costs.items())
        self.tell(f"planned: {shares} of the unpruned network")
        return plan

    def _aim(self, budget: Budget, costs: Sequence[CostModel]) -> Budget:
        """A latency budget is planned for with the table's held-out error to spare."""
        calibration = self.table.calibration if self.table is not None else None
        if budget.cost != "latency_ms" or calibration is None:
            return budget
        cost = next(c for c in costs if c.name == "latency_ms")
        return Budget("latency_ms", limit=budget.absolute(cost) * (1 - min(0.2, calibration.mape)))

    @property
    def timed_here(self) -> bool:
        """Whether the table is this machine's and a latency budget is asked for."""
        return self._local and any(b.cost == "latency_ms" for b in self.budgets)

    @property
    def _local(self) -> bool:
        if self.table is None or self.table.origin != "measured":
            return False
        from .latency.local import is_this_machine

        return is_this_machine(self.table)

    def _search_by_clock(
        self, model: nn.Module, trace: NetworkTrace, scores: GroupScores, costs: Sequence[CostModel],
        aims: tuple[Budget, ...], plan: PruningPlan,
    ) -> PruningPlan:  # fmt: skip
        """Time the structure, aim lower while it is over the budget."""
        cost = next(c for c in costs if c.name == "latency_ms")
        asked = min(b.absolute(cost) for b in self.budgets if b.cost == "latency_ms")
        limit = min(b.absolute(cost) for b in aims if b.cost == "latency_ms")
        for _ in range(_TIMING_ATTEMPTS):
            measured = self._time(apply_plan(copy.deepcopy(model), plan, self.inputs))
            self.folder.log(f"latency predicted {plan.costs['latency_ms'].predicted:.4g} ms, measured {measured:.4g} ms")
            if measured <= asked:
                break
            limit *= 0.99 * asked / measured
            tighter = tuple(Budget("latency_ms", limit=limit) if b.cost == "latency_ms" else b for b in aims)
            plan = self.strategy.search(trace, scores, costs, tighter)
        return plan

    def cut(self, model: nn.Module, trace: NetworkTrace, plan: PruningPlan) -> nn.Module:
        with self.stage("cut"):
            pruned, verdicts = self.strategy.carve(model, self.split.scoring, trace, plan, self.holdout_accuracy)
        self.tell("cut and repaired, holdout accuracy: " + ", ".join(f"{n} {v:.2%}" for n, v in verdicts.items()))
        return pruned

    def recover(self, pruned: nn.Module, teacher: nn.Module) -> nn.Module:
        assert self.recovery is not None
        forward, augment = self.strategy.forward, self.augment

        def varied(net: nn.Module, batch: Any) -> Any:
            return forward(net, batch)

        loader = _Augmented(self.split.training, augment) if augment is not None else self.split.training
        with self.stage("recover"):
            return train(pruned, loader, self.recovery, teacher=teacher, seed=self.seed, forward=varied,
                         get_labels=self.strategy.get_labels, checkpoint=self.folder.stage("training.safetensors"),
                         on_epoch=self._epoch).eval()  # fmt: skip

    def _epoch(self, report: EpochReport) -> None:
        self.tell(f"epoch {report.epoch} of {report.epochs}: loss {report.loss:.3f}")

    def quantize(self, pruned: nn.Module, teacher: nn.Module, plan: PruningPlan, metrics: dict[str, Any]) -> Any:
        if self.bits is None:
            return None
        from .quantize import quantize_run

        with self.stage("quantize"):
            result, figures = quantize_run(
                pruned, self.split.scoring, self.inputs, self.bits, folder=self.folder.path, teacher=teacher,
                judge=self.test if self.test is not None else self.split.holdout,
            )  # fmt: skip
        last = metrics.get("recovered", metrics["pruned"])
        metrics["quantized"] = {**dict.fromkeys(last), "macs": last["macs"], "params": last["params"], **figures}
        self.tell(f"quantized: accuracy {figures['accuracy']:.2%}, {figures['size_mb']:.3f} MB")
        return result

    def finish(self, metrics: dict[str, Any], pruned: nn.Module, plan: PruningPlan) -> None:
        final = metrics.get("recovered", metrics["pruned"])
        metrics["budgets"] = [self._verdict(budget, metrics["base"], plan, final) for budget in self.budgets]
        metrics["seconds"] = {name: round(value, 3) for name, value in self.seconds.items()}
        metrics["data"] = {
            "chose": f"{self.split.sizes[0]} training images",
            "judged": "test data, read once" if self.test is not None else f"holdout of {self.split.sizes[1]} images",
        }
        metrics["latency_table"] = table_info(self.table) if self.table is not None else None
        metrics["versions"] = versions()
        metrics["seed"] = self.seed
        self.folder.write_json(METRICS, _finite(metrics))
        write_report(self.folder.path)
        self.folder.finish()
        self.tell(f"report: {self.folder.path / REPORT}")

    def _verdict(
        self, budget: Budget, base: dict[str, Any], plan: PruningPlan, final: dict[str, Any]
    ) -> dict[str, Any]:
        cost: PlannedCost = plan.costs[budget.cost]
        asked = budget.limit if budget.limit is not None else float(budget.fraction or 0) * cost.base
        if budget.fraction is not None and budget.cost == "latency_ms" and base.get("latency_ms_measured"):
            # A fraction of the unpruned latency means of the measured one, where it was measured.
            asked = min(asked, budget.fraction * base["latency_ms_measured"])
        key = "latency_ms_measured" if budget.cost == "latency_ms" else budget.cost
        measured = final.get(key)
        met = (measured if measured is not None else cost.predicted) <= asked * (1 + 1e-9)
        return {"cost": budget.cost, "asked": asked, "predicted": cost.predicted, "measured": measured, "met": met}

    # ------------------------------------------------------------------------------------------- figures

    def holdout_accuracy(self, model: nn.Module) -> float:
        return accuracy(model, self.split.holdout, get_labels=self.strategy.get_labels, forward=self.strategy.forward)

    def accuracy(self, model: nn.Module) -> float:
        judge = self.test if self.test is not None else self.split.holdout
        return accuracy(model, judge, get_labels=self.strategy.get_labels, forward=self.strategy.forward)

    def figures(self, model: nn.Module, plan: PruningPlan) -> dict[str, Any]:
        """Accuracy and costs of a cut network; MACs, parameters and memory counted on the network itself."""
        trace = trace_network(model, self.inputs, verify=False)
        counted = {c.name: c.base for c in (macs(trace), params(trace), PeakActivationMemory(trace))}
        latency = plan.costs.get("latency_ms")
        return {"accuracy": self.accuracy(model), **counted,
                "latency_ms_predicted": latency.predicted if latency else None,
                "latency_ms_measured": None, "size_mb": None}  # fmt: skip

    def export(self, model: nn.Module, path: str | Path) -> dict[str, Any]:
        from .export import export_onnx

        check = export_onnx(model, self.inputs, self.folder.path / path)
        return {"size_mb": check.size_mb, "latency_ms_measured": self._time_file(check.path),
                "onnx_max_abs_difference": check.max_abs_difference}  # fmt: skip

    def _time(self, model: nn.Module) -> float:
        from .export import export_onnx

        with tempfile.TemporaryDirectory() as scratch:
            return self._time_file(export_onnx(model, self.inputs, Path(scratch) / ONNX).path) or 0.0

    def _time_file(self, path: Path) -> float | None:
        """Milliseconds on this machine; None where the table is another device's."""
        if self.table is not None and not self._local:
            return None
        from .latency import measure_onnx

        return measure_onnx(path, threads=self.table.setting.threads if self.table is not None else 1).latency_ms

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        self.folder.log(f"{name} begins")
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class _Augmented:
    """A loader whose images are varied on the way out."""

    def __init__(self, loader: Iterable[Any], augment: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._loader, self._augment = loader, augment

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        for inputs, *rest in self._loader:
            yield [self._augment(inputs), *rest]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch for the run, and give the caller's generator back its state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def _warnings_logged(folder: RunFolder) -> Iterator[None]:
    """Warnings of the run go to its log as well as to the caller."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            yield
        finally:
            for warning in caught:
                if folder.path.exists():
                    folder.log(f"warning: {first_line(warning.message) if isinstance(warning.message, Warning) else ''}")
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _metric_name(cost: CostModel) -> str:
    return "latency_ms_predicted" if cost.name == "latency_ms" else cost.name


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _config(
    model: nn.Module, budgets: Sequence[Budget], table: LatencyTable | None, recovery: FineTuning | None, bits: Any,
    strategy: OneShot, holdout: float, seed: int, tested: bool,
) -> dict[str, Any]:  # fmt: skip
    """What was asked for, as JSON; two runs with the same configuration and data are the same run."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(images := strategy.images, int) or images < 2:
        raise DataError(f"expected images of 2 or more, got {images!r}")
    return {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "budgets": [str(budget) for budget in budgets],
        "latency_table": table.name if table is not None else None,
        "recovery": None if recovery is None else {"kind": type(recovery).__name__, **asdict(recovery)},
        "bits": None if bits is None else json.loads(json.dumps(asdict(bits), default=str)),
        "rho": strategy.rho, "tap": repr(strategy.tap), "limits": asdict(strategy.limits),
        "repairs": [repr(repair) for repair in strategy.repairs], "images": images, "holdout": holdout, "seed": seed,
        "test_data": tested, "versions": versions(),
    }  # fmt: skip


def _finite(data: Any) -> Any:
    """JSON has no NaN: a figure that is not finite becomes null."""
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


__all__ = ["CompressionResult", "apply_plan", "compress", "load_weights", "read_weights", "WEIGHTS_FILE"]
