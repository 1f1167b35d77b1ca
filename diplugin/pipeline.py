"""The main job: a model, data and budgets become a smaller model with its proof.

    split → judge → trace → score → search ⇄ time → cut → recover → (quantize) → export → report

Each arrow is one function of a layer below; this file only carries data from one to the next, keeps checkpoints and
writes down what was measured. Where the latency table is this very machine's, the cut network is timed before any
effort is spent on recovering it, and the search is told to aim lower until the budget holds as measured.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .boundary import guarded_forward, guarded_labels
from .costs import Budget, CostModel, PeakActivationMemory, macs, params
from .costs.latency import LatencyCost
from .discriminant.targets import check_positive
from .errors import BudgetError, DataError, DipluginError, ModelError
from .features import Forward, GetLabels, device_of, forward_inputs, labels_of
from .groups import first_line
from .holdout import Split, split_holdout
from .measurements import Measure, finite, verdict, versions
from .network import NetworkTrace, trace_network
from .plan import PruningPlan
from .recovery import REPAIRS, EpochReport, FineTuning, Repair, train
from .report import table_info, write_report
from .run_folder import METRICS, ONNX, REPORT, SCORES, RunFolder
from .scoring import GroupScores
from .search import SearchLimits
from .strategies import OneShot, search_by_clock
from .surgery import PLAN_FILE, apply_plan, save_pruned
from .tables import LatencyTable
from .taps import AfterActivation, Tap

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
    source: Mapping[str, str] | None = None,
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
        source: what the command line calls the model ("source") and the data ("data"); recorded.
        tell: called with one line for every stage.

    Raises:
        UserError: input that cannot be used; the message says what was expected.
        InfeasibleBudget: no structure within reach meets the budgets.
    """
    get_labels, forward = guarded_labels(get_labels), guarded_forward(forward)
    strategy = OneShot(
        rho=rho, tap=tap or AfterActivation(), limits=limits or SearchLimits(), repairs=tuple(repairs),
        images=images, get_labels=get_labels, forward=forward,
    )  # fmt: skip
    config = {**_config(model, budgets, latency_table, recovery, bits, strategy, holdout, seed),
              "test_data": test_loader is not None, **(source or {})}  # fmt: skip
    if not budgets:
        raise BudgetError("expected a budget such as macs=0.5, got none")
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(out if out is not None else Path(scratch) / "run", config, resume=resume)
        try:
            with _seeded(seed), _warnings_logged(folder):
                torch.manual_seed(seed)
                split = split_holdout(loader, holdout, seed)
                inputs = tuple(x.to(device_of(model)) if isinstance(x, torch.Tensor) else x for x in example_inputs)
                measure = Measure(test_loader if test_loader is not None else split.holdout, inputs, latency_table,
                                  get_labels, forward)  # fmt: skip
                run = _Run(folder, strategy, model, split, measure, tuple(budgets), recovery, bits, augment, seed,
                           test_loader is not None, tell or (lambda _: None))  # fmt: skip
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
    measure: Measure
    budgets: tuple[Budget, ...]
    recovery: FineTuning | None
    bits: Any
    augment: Callable[[torch.Tensor], torch.Tensor] | None
    seed: int
    tested: bool
    tell: Tell
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def result(self) -> CompressionResult:
        base = copy.deepcopy(self.model).eval()
        trace, costs = self.trace(base)
        self.judge(base, costs)
        scores = self.score(base, trace)
        plan = self.search(base, trace, scores, costs)
        pruned = self.cut(base, trace, plan)
        if self.recovery is not None:
            pruned = self.recover(pruned, base, plan, self.recovery)
        self.export(pruned, plan)
        quantized = self.quantize(pruned, base) if self.bits is not None else None
        self.finish(plan)
        return CompressionResult(pruned.eval(), plan, self.metrics, self.folder.path, scores, quantized)

    @property
    def final(self) -> dict[str, Any]:
        """Figures of the float network that comes out."""
        return self.metrics["recovered" if "recovered" in self.metrics else "pruned"]

    def trace(self, model: nn.Module) -> tuple[NetworkTrace, list[CostModel]]:
        with self.stage("trace"):
            trace = trace_network(model, self.measure.inputs)
            costs: list[CostModel] = [macs(trace), params(trace), PeakActivationMemory(trace)]
            if self.measure.table is not None:
                costs.append(LatencyCost(trace, self.measure.table))
        self.tell(f"traced: {len(trace.prunable)} of {len(trace.groups)} channel groups can be pruned")
        return trace, costs

    def judge(self, model: nn.Module, costs: Sequence[CostModel]) -> None:
        with self.stage("judge"):
            base = self.metrics["base"] = self.measure.base(model, costs)
        self.tell(f"unpruned: accuracy {base['accuracy']:.2%}, {base['macs'] / 1e6:.1f} M MACs")

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
        if path.exists():  # a run taken up again keeps its plan
            return PruningPlan.load(path)
        latency = next((c for c in costs if c.name == "latency_ms"), None)
        with self.stage("search"):
            if latency is not None and any(b.cost == "latency_ms" for b in self.budgets):
                plan = self._search_latency(model, trace, scores, costs, latency)
            else:
                plan = self.strategy.search(trace, scores, costs, self.budgets)
            plan.save(path)
        shares = ", ".join(f"{name} {cost.fraction:.0%}" for name, cost in plan.costs.items())
        self.tell(f"planned: {shares} of the unpruned network")
        return plan

    def _search_latency(
        self, model: nn.Module, trace: NetworkTrace, scores: GroupScores, costs: Sequence[CostModel], cost: CostModel
    ) -> PruningPlan:
        """Plan with the table's held-out error to spare, and by the clock where this is the table's machine."""
        table, others = self.measure.table, [b for b in self.budgets if b.cost != "latency_ms"]
        limit = min(self._limit_ms(b, cost) for b in self.budgets if b.cost == "latency_ms")
        spare = table.calibration.mape if table is not None and table.calibration is not None else 0.0

        def search(aim_ms: float) -> PruningPlan:
            return self.strategy.search(trace, scores, costs, [*others, Budget("latency_ms", limit=aim_ms)])

        def milliseconds(plan: PruningPlan) -> float:
            return self.measure.milliseconds(apply_plan(copy.deepcopy(model), plan, self.measure.inputs)) or 0.0

        aim = limit * (1 - min(0.2, spare))
        if not self.measure.local:
            return search(aim)
        return search_by_clock(search, milliseconds, limit, aim, self.folder.log)

    def _limit_ms(self, budget: Budget, cost: CostModel) -> float:
        """A fraction of the unpruned latency: of the measured one where that is less than the predicted one."""
        measured = self.metrics["base"].get("latency_ms_measured")
        limit = budget.absolute(cost)
        return min(limit, budget.fraction * measured) if budget.fraction is not None and measured else limit

    def cut(self, model: nn.Module, trace: NetworkTrace, plan: PruningPlan) -> nn.Module:
        def on_holdout(net: nn.Module) -> float:
            return self.measure.accuracy(net, self.split.holdout)

        with self.stage("cut"):
            pruned, verdicts = self.strategy.carve(model, self.split.scoring, trace, plan, on_holdout)
            self.metrics["pruned"] = self.measure.pruned(pruned, plan)
        self.tell("repaired, holdout accuracy: " + ", ".join(f"{n} {v:.2%}" for n, v in verdicts.items()))
        self.tell(f"pruned: accuracy {self.final['accuracy']:.2%} before any training")
        return pruned

    def recover(self, pruned: nn.Module, teacher: nn.Module, plan: PruningPlan, settings: FineTuning) -> nn.Module:
        loader = self.split.training if self.augment is None else _Augmented(self.split.training, self.augment)
        with self.stage("recover"):
            train(pruned, loader, settings, teacher=teacher, seed=self.seed, forward=self.strategy.forward,
                  get_labels=self.strategy.get_labels, checkpoint=self.folder.stage("training.safetensors"),
                  on_epoch=self._epoch).eval()  # fmt: skip
            self.metrics["recovered"] = self.measure.pruned(pruned, plan)
        self.tell(f"recovered: accuracy {self.final['accuracy']:.2%}")
        return pruned

    def _epoch(self, report: EpochReport) -> None:
        self.tell(f"epoch {report.epoch} of {report.epochs}: loss {report.loss:.3f}")

    def export(self, pruned: nn.Module, plan: PruningPlan) -> None:
        with self.stage("export"):
            save_pruned(pruned, plan, self.folder.path)
            self.final.update(self.measure.exported(pruned, self.folder.path / ONNX))

    def quantize(self, pruned: nn.Module, teacher: nn.Module) -> Any:
        from .quantize import quantize_run

        with self.stage("quantize"):
            result, figures = quantize_run(
                pruned, self.split.scoring, self.measure.inputs, self.bits,
                folder=self.folder.path, teacher=teacher, judge=self.measure.judge,
                training_loader=self.split.training,
            )  # fmt: skip
        costs = {key: self.final[key] for key in ("macs", "params", "memory_mb")}
        self.metrics["quantized"] = {**costs, **figures}
        self.tell(f"quantized: accuracy {figures['accuracy']:.2%}, {figures['size_mb']:.3f} MB")
        return result

    def finish(self, plan: PruningPlan) -> None:
        table = self.measure.table
        self.metrics.update(
            budgets=[verdict(budget, self.metrics["base"], plan, self.final) for budget in self.budgets],
            seconds={name: round(value, 3) for name, value in self.seconds.items()},
            data={"chose": f"{self.split.sizes[0]} training images",
                  "judged": "test data, read once" if self.tested else f"holdout of {self.split.sizes[1]} images"},
            latency_table=None if table is None else table_info(table), versions=versions(), seed=self.seed,
        )  # fmt: skip
        self.folder.write_json(METRICS, finite(self.metrics))
        write_report(self.folder.path)
        self.folder.finish()
        self.tell(f"report: {self.folder.path / REPORT}")

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
                if folder.path.exists() and isinstance(warning.message, Warning):
                    folder.log(f"warning: {first_line(warning.message)}")
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _config(
    model: nn.Module, budgets: Sequence[Budget], table: LatencyTable | None, recovery: FineTuning | None, bits: Any,
    strategy: OneShot, holdout: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What was asked for, as JSON; two runs with the same configuration and data are the same run."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    check_positive(strategy.rho, "rho")
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
        "ranking": repr(strategy.ranking), "versions": versions(),
    }  # fmt: skip


__all__ = ["CompressionResult", "compress"]
