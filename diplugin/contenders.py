"""Ways to choose channels, each an object that prunes a copy of a network to a fraction of its MACs.

Criteria of torch-pruning, DI among them, run in torch-pruning's own pruner. The ratio at which it meets a target is
found by bisection on what it *would* remove, whose cost is predicted from channel counts, so that a network is cut
once per target. `Compress` is the greedy search instead, with the repairs that need no gradient step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from .accuracy import accuracy
from .costs import Budget, macs
from .dependency import dependency_graph
from .errors import InfeasibleBudget, UserError
from .features import Forward, GetLabels, device_of, forward_inputs, labels_of, to_device
from .network import NetworkTrace
from .plan import PruningPlan
from .recovery import recalibrate_batchnorm
from .scoring import GroupScores
from .strategies import MeasuredCuts, OneShot

#: Steps of the bisection on torch-pruning's ratio: its thresholds lie closer than this only by chance.
_BISECTIONS = 14
_Removals = list[tuple[str, bool, list[int]]]


@dataclass(frozen=True)
class Case:
    """What every contender is given.

    Attributes:
        model: the unpruned network in eval mode; contenders work on copies.
        inputs: example inputs at batch 1.
        trace: its groups and layers.
        images: calibration data, chunks of training images with their labels, read as often as wanted.
        holdout: training images that contenders may choose by, apart from `images`; may be None.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    trace: NetworkTrace
    images: Sequence[Any]
    holdout: Iterable[Any] | None = None
    get_labels: GetLabels = labels_of
    forward: Forward = forward_inputs


class Contender(Protocol):
    """One way to choose channels."""

    @property
    def name(self) -> str: ...

    def prune(self, case: Case, fractions: Sequence[float]) -> Mapping[float, nn.Module | None]:
        """A pruned copy of the model at or under every fraction of its MACs, BatchNorm as it should be judged.

        None where the contender cannot reach the fraction.
        """
        ...


@dataclass(frozen=True)
class Criterion:
    """An importance in torch-pruning's BasePruner.

    Attributes:
        name: what the table calls it.
        importance: makes the importance for a case.
        global_pruning: one threshold for the whole network instead of one ratio for every layer.
        gradients: it reads `weight.grad` of the cross-entropy on the calibration images.
    """

    name: str
    importance: Callable[[nn.Module, Case], Any]
    global_pruning: bool = False
    gradients: bool = False

    def prune(self, case: Case, fractions: Sequence[float]) -> dict[float, nn.Module | None]:
        model = copy.deepcopy(case.model)
        if self.gradients:
            _accumulate_gradients(model, case)
        wishes = _Wishes(model, case, _Remembered(self.importance(model, case)), self.global_pruning)
        return {fraction: _cut(case, wishes.at(fraction)) for fraction in fractions}


def _cut(case: Case, removals: _Removals | None) -> nn.Module | None:
    if removals is None:
        return None
    model = copy.deepcopy(case.model)
    dependency_graph(model, case.inputs).load_pruning_history(removals)
    images = sum(len(case.get_labels(batch)) for batch in case.images)
    return recalibrate_batchnorm(model, case.images, images=images, forward=case.forward)


class _Remembered(tp.importance.Importance):
    """An importance that is asked once for every group: nothing is removed while the ratio is looked for."""

    def __init__(self, importance: Any) -> None:
        self._importance = importance
        self._known: dict[Any, Tensor | None] = {}

    def __call__(self, group: Any) -> Any:
        key = (group[0].dep.target.module, group[0].dep.handler)
        if key not in self._known:
            self._known[key] = self._importance(group)
        return self._known[key]


class _Wishes:
    """What a pruner would remove at a ratio, and the ratio that meets a target."""

    def __init__(self, model: nn.Module, case: Case, importance: Any, global_pruning: bool) -> None:
        self._cost, self._trace = macs(case.trace), case.trace
        self._seen: dict[float, tuple[float, _Removals]] = {}
        layers = dict(model.named_modules())
        alone = {m.layer for g in case.trace.groups if not g.prunable for m in g.members if m.side == "out"}
        inputs: Any = case.inputs
        self._pruner = tp.pruner.BasePruner(
            model, inputs, importance, global_pruning=global_pruning, pruning_ratio=0.5,
            ignored_layers=[layers[name] for name in alone if name in layers],
            in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
        )  # fmt: skip

    def at(self, fraction: float) -> _Removals | None:
        """The removals that come nearest to the target from below; None if even the largest ratio is above it."""
        low, high = 0.0, 1.0 - 1e-6
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._share(middle)[0] > fraction:
                low = middle
            else:
                high = middle
        within = [seen for seen in self._seen.values() if seen[0] <= fraction]
        return max(within, key=lambda seen: seen[0])[1] if within else None

    def _share(self, ratio: float) -> tuple[float, _Removals]:
        if ratio not in self._seen:
            pruner: Any = self._pruner
            pruner.current_step, pruner.per_step_pruning_ratio = 0, [ratio, ratio]
            graph = pruner.DG
            removals = [
                (graph._module2name[g[0].dep.target.module], bool(graph.is_out_channel_pruning_fn(g[0].dep.handler)),
                 list(g[0].idxs))
                for g in pruner.step(interactive=True)
            ]  # fmt: skip
            self._seen[ratio] = (self._cost.cost(self._widths(removals)) / self._cost.base, removals)
        return self._seen[ratio]

    def _widths(self, removals: _Removals) -> dict[str, int]:
        widths = self._trace.base_widths
        for name, is_out, indices in removals:
            side = "out" if is_out else "in"
            for group in self._trace.prunable:
                for member in group.members:
                    if (member.layer, member.side) == (name, side) and set(indices) <= set(member.channels):
                        widths[group.name] = group.channels - len(indices) // group.multiplicity(member)
        return widths


def _accumulate_gradients(model: nn.Module, case: Case) -> None:
    """Gradients of the cross-entropy over all calibration images, for criteria that read them."""
    with torch.enable_grad():
        for batch in case.images:
            batch = to_device(batch, device_of(model))
            labels, logits = case.get_labels(batch), case.forward(model, batch)
            if labels.ndim == 1:
                loss = F.cross_entropy(logits, labels)
            else:
                loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits))
            (loss * len(labels)).backward()


def torch_pruning_contenders(scopes: Sequence[str] = ("local", "global")) -> list[Contender]:
    """torch-pruning's own criteria, each with one ratio for all layers and with one threshold for all."""
    makers: dict[str, tuple[Callable[[], Any], bool]] = {
        "random": (tp.importance.RandomImportance, False),
        "L1": (lambda: tp.importance.MagnitudeImportance(p=1), False),
        "L2": (lambda: tp.importance.MagnitudeImportance(p=2), False),
        "LAMP": (lambda: tp.importance.LAMPImportance(p=2), False),
        "FPGM": (lambda: tp.importance.FPGMImportance(p=2), False),
        "BN scale": (tp.importance.BNScaleImportance, False),
        "Taylor": (tp.importance.TaylorImportance, True),
    }
    return [
        Criterion(f"{name}, {scope}", lambda _model, _case, make=make: make(), scope == "global", gradients)
        for name, (make, gradients) in makers.items()
        for scope in scopes
    ]


def drop_in(name: str, global_pruning: bool, **options: Any) -> Criterion:
    """`DIImportance` with these options in torch-pruning's pruner."""

    def make(model: nn.Module, case: Case) -> Any:
        import diplugin

        importance: Any = diplugin.DIImportance(get_labels=case.get_labels, forward=case.forward, **options)
        return importance.fit(model, case.images)

    return Criterion(name, make, global_pruning)


@dataclass(frozen=True)
class Compress:
    """What `compress` does without a gradient step: greedy search, then the repair that the holdout likes best.

    Attributes:
        measured: corrects the plan by what cut networks lose; None leaves it to DI alone.
        tell: called with one line for every round of that.
    """

    name: str = "DI, compress"
    strategy: OneShot = field(default_factory=OneShot)
    measured: MeasuredCuts | None = None
    tell: Callable[[str], None] = lambda _: None

    def prune(self, case: Case, fractions: Sequence[float]) -> dict[float, nn.Module | None]:
        scores = self.strategy.score(case.model, case.images, case.trace)
        judged = case.holdout if case.holdout is not None else case.images

        def judge(model: nn.Module) -> float:
            return accuracy(model, judged, get_labels=case.get_labels, forward=case.forward)

        pruned: dict[float, nn.Module | None] = {}
        for fraction in fractions:
            try:
                plan = self._plan(case, scores, Budget("macs", fraction=fraction))
            except InfeasibleBudget:
                pruned[fraction] = None
                continue
            pruned[fraction] = self.strategy.carve(case.model, case.images, case.trace, plan, judge)[0].eval()
        return pruned

    def _plan(self, case: Case, scores: GroupScores, budget: Budget) -> PruningPlan:
        once, costs = self.strategy, [macs(case.trace)]
        if self.measured is None:
            return once.search(case.trace, scores, costs, [budget])
        if case.holdout is None:
            raise UserError("expected a holdout to measure cuts on, got none")
        loss_of = self.measured.cut_loss(once, case.model, case.trace, case.images, case.holdout)
        descent = self.measured.descent(once, case.model, case.trace, scores, costs, loss_of, self.tell)
        return descent.plan([budget])


def default_contenders(*, compress: bool = True) -> list[Contender]:
    """Every criterion of torch-pruning, DI as a drop-in beside them, and `compress`."""
    ours: list[Contender] = [drop_in("DI, local", False), drop_in("DI, global", True)]
    return [*torch_pruning_contenders(), *ours, *([Compress()] if compress else [])]
