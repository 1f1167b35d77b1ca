"""The main job: a model, data and budgets become a smaller model with its proof.

    split → trace → judge → score → shrink → recover → (quantize) → export → report

Each arrow is one function of a layer below; this file only carries data from one to the next and writes down what was
measured. How the network shrinks (search, surgery and repair, at once or in steps) is the strategy's affair.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .boundary import GuardedLoader, guarded_forward, guarded_labels
from .configuration import Configuration, listed
from .costs import Budget, CostModel, PeakActivationMemory, macs, params
from .costs.latency import LatencyCost
from .features import Forward, GetLabels, device_of, forward_inputs, labels_of
from .holdout import Split, split_holdout
from .measurements import Measure, finite, verdict, versions
from .network import NetworkTrace, trace_network
from .plan import PruningPlan
from .ranking import ByAll, Ranking
from .recovery import REPAIRS, EpochReport, FineTuning, Repair
from .report import table_info, write_report
from .run_folder import METRICS, ONNX, REPORT, SCORES, RunFolder
from .scoring import GroupScores
from .search import GreedySearch, Search, SearchLimits
from .strategies import Job, OneShot, Strategy
from .surgery import save_pruned
from .tables import LatencyTable
from .taps import AfterActivation, Tap
from .team import current_team

#: Beyond what two timings of one network differ by.
CLEARLY_SLOWER = 1.1
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
    strategy: Strategy | None = None,
    bits: Any = None,
    out: str | Path | None = None,
    test_loader: Iterable[Any] | None = None,
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
    rho: float = 10.0,
    tap: Tap | None = None,
    ranking: Ranking | None = None,
    limits: SearchLimits | None = None,
    search: Search | None = None,
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
        strategy: such as `MeasuredCuts`, which corrects the plan by trial cuts, or `StructureDistillation`, which
            prunes in steps; None shrinks the network at once by DI's plan.
        bits: settings of `diplugin.quantize`; None leaves the weights in float.
        out: run folder, new or empty; None writes nothing.
        test_loader: data that is read once, at the end, to judge by; None judges on the holdout.
        augment: varies a batch of training images [N, ...] while fine-tuning.
        rho, tap: of DI.
        ranking: which channels of a group leave first, while DI says how many; None for `ranking.ByAll()`.
        limits: floor and alignment of the widths.
        search: `ExactSearch()` solves for the best widths; None, `GreedySearch()`, comes close in less time.
        repairs: what is tried on the cut network, without a gradient step; the holdout chooses.
        images: training images used for scores and repairs; the refit has a number of its own.
        holdout: fraction of the training data set aside.
        seed: of every random choice.
        resume: go on with a run that was killed; one that is finished is left alone, and an error says so.
        source: what the command line calls the model ("source") and the data ("data"); recorded.
        tell: called with one line for every stage.

    Where `torch.distributed` is initialised the work is shared out: every process is given the same arguments and
    returns the same network, the first one alone writes the folder, times and tells.

    Raises:
        UserError: input that cannot be used; the message says what was expected.
        InfeasibleBudget: no structure within reach meets the budgets.
    """
    get_labels, forward = guarded_labels(get_labels), guarded_forward(forward)
    once = OneShot(
        rho=rho, tap=tap or AfterActivation(), ranking=ranking or ByAll(), limits=limits or SearchLimits(),
        searcher=search or GreedySearch(), repairs=listed(repairs, "Recalibrate()"), images=images,
        get_labels=get_labels, forward=forward,
    )  # fmt: skip
    budgets = listed(budgets, "Budget('macs', fraction=0.5)")
    asked = Configuration(budgets, once, latency_table, recovery, strategy, bits, augment, holdout, seed)
    config = {**asked.record(model), "test_data": test_loader is not None, **(source or {})}
    team = current_team(loader)
    if team.rank:  # of many processes the first one writes and speaks
        out, resume, tell = None, False, None
    with team.guarding(), tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(out if out is not None else Path(scratch) / "run", config, resume=resume)
        try:
            folder.follow_first(team)
            with _seeded(seed), folder.recording_warnings():
                split = split_holdout(loader, holdout, seed)
                inputs = tuple(x.to(device_of(model)) if isinstance(x, torch.Tensor) else x for x in example_inputs)
                judged = split.holdout if test_loader is None else GuardedLoader(test_loader)
                measure = Measure(judged, inputs, latency_table, get_labels, forward, Path(scratch) / "unpruned.onnx")
                run = _Run(folder, asked, model, split, measure, test_loader is not None, tell or (lambda _: None))
                result = run.result()
        except Exception:
            folder.abandon()
            raise
    return result if out is not None else replace(result, folder=None)


@dataclass
class _Run:
    """One compression on its way; every method is a stage."""

    folder: RunFolder
    asked: Configuration
    model: nn.Module
    split: Split
    measure: Measure
    tested: bool
    tell: Tell
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    def result(self) -> CompressionResult:
        base = copy.deepcopy(self.model).eval()
        trace, costs = self.trace(base)
        self.judge(base, costs)
        scores = self.score(base, trace)
        job = self.job(base, trace, costs)
        pruned, plan = self.shrink(job, scores)
        if self.asked.recovery is not None:
            pruned = self.recover(job, pruned, plan, self.asked.recovery)
        self.export(pruned, plan)
        quantized = self.quantize(pruned, base) if self.asked.bits is not None else None
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
            scores = self.asked.once.score(model, self.split.scoring, trace)
            self.folder.write_json(SCORES, {
                "di": dict(scores.di), "rho": scores.rho, "images": scores.images,
                "scores": {name: values.tolist() for name, values in scores.scores.items()},
                "left_alone": {g.name: g.note for g in trace.groups if not g.prunable},
            })  # fmt: skip
        self.tell(f"scored: DI of {len(scores.di)} groups on {scores.images} images")
        return scores

    def job(self, base: nn.Module, trace: NetworkTrace, costs: Sequence[CostModel]) -> Job:
        asked, unpruned_ms = self.asked, self.metrics["base"].get("latency_ms_measured")
        return Job(base, trace, tuple(costs), asked.budgets, self.split, self.measure, self.folder, asked.seed,
                   unpruned_ms, asked.augment, self.tell, self.stage)  # fmt: skip

    def shrink(self, job: Job, scores: GroupScores) -> tuple[nn.Module, PruningPlan]:
        once, strategy = self.asked.once, self.asked.strategy
        shrunk = once.shrink(job, scores) if strategy is None else strategy.shrink(once, job, scores)
        if shrunk.steps:
            self.metrics["steps"] = list(shrunk.steps)
        with self.stage("cut"):
            self.metrics["pruned"] = self.measure.pruned(shrunk.model, shrunk.plan)
        self.tell(f"pruned: accuracy {self.final['accuracy']:.2%} before recovery")
        return shrunk.model, shrunk.plan

    def recover(self, job: Job, pruned: nn.Module, plan: PruningPlan, settings: FineTuning) -> nn.Module:
        with self.stage("recover"):
            job.train(pruned, plan, settings, seed=self.asked.seed, on_epoch=self._epoch,
                      checkpoint=self.folder.stage("training.safetensors"))  # fmt: skip
            self.metrics["recovered"] = self.measure.pruned(pruned, plan)
        self.tell(f"recovered: accuracy {self.final['accuracy']:.2%}")
        return pruned

    def _epoch(self, report: EpochReport) -> None:
        self.tell(f"epoch {report.epoch} of {report.epochs}: loss {report.loss:.3f}")

    def export(self, pruned: nn.Module, plan: PruningPlan) -> None:
        path = self.folder.path / ONNX
        with self.stage("export"):
            save_pruned(pruned, plan, self.folder.path)
            self.final.update(self.measure.exported(pruned, path))
            before, after = self.measure.timed(self.measure.unpruned, path)
            self.metrics["base"]["latency_ms_measured"], self.final["latency_ms_measured"] = before, after
        if before and after and after > CLEARLY_SLOWER * before:
            self.tell(
                f"slower than unpruned on this machine, {after:.2f} ms against {before:.2f}: its runtime likes "
                "other widths; give a latency budget with a table, or keep to multiples of 8 (align)"
            )

    def quantize(self, pruned: nn.Module, teacher: nn.Module) -> Any:
        from .quantize import quantize_run

        with self.stage("quantize"):
            result, figures = quantize_run(
                pruned, self.split.scoring, self.measure.inputs, self.asked.bits,
                folder=self.folder.path, teacher=teacher, judge=self.measure.judge,
                training_loader=self.split.training, get_labels=self.measure.get_labels, forward=self.measure.forward,
            )  # fmt: skip
        costs = {key: self.final[key] for key in ("macs", "params", "memory_mb")}
        self.metrics["quantized"] = {**costs, **figures}
        self.tell(f"quantized: accuracy {figures['accuracy']:.2%}, {figures['size_mb']:.3f} MB")
        return result

    def finish(self, plan: PruningPlan) -> None:
        table = self.measure.table
        self.metrics.update(
            budgets=[verdict(budget, self.metrics["base"], plan, self.final) for budget in self.asked.budgets],
            seconds={name: round(value, 3) for name, value in self.seconds.items()},
            data={"chose": f"{self.split.sizes[0]} training images",
                  "judged": "test data, read once" if self.tested else f"holdout of {self.split.sizes[1]} images"},
            latency_table=None if table is None else table_info(table), versions=versions(), seed=self.asked.seed,
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


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch for the run, and give the caller's generator back its state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


__all__ = ["CompressionResult", "compress"]
