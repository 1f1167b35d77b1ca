"""NNI's own pruners and `DIPruner` beside them: one sparsity for every layer, removed for real by `speedup`.

They rank the outputs of single layers, so they run on groups with one producer, which is every group inside a residual
block. The sparsity is the smallest that meets the target, found on predicted costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from diplugin.contenders import Case
from diplugin.costs import macs
from diplugin.groups import ChannelGroup
from diplugin.recovery import recalibrate_batchnorm

_STEPS = 200


@dataclass(frozen=True)
class NNIPruner:
    """A pruner of NNI's kind: `make(model, config_list, case)` builds it."""

    name: str
    make: Callable[[nn.Module, list[dict[str, Any]], Case], Any]

    def prune(self, case: Case, fractions: Sequence[float]) -> dict[float, nn.Module | None]:
        import diplugin_nni

        groups = {g: producers[0] for g in case.trace.prunable if len(producers := _producers(g)) == 1}
        pruned: dict[float, nn.Module | None] = {}
        for fraction in fractions:
            ratio = _ratio(case, list(groups), fraction)
            if ratio is None:
                pruned[fraction] = None
                continue
            model = copy.deepcopy(case.model)
            config = [{"op_names": list(groups.values()), "sparse_ratio": ratio}]
            _, masks = self.make(model, config, case).compress()
            small = diplugin_nni.speedup(copy.deepcopy(case.model), masks, case.inputs)
            images = sum(len(case.get_labels(batch)) for batch in case.images)
            pruned[fraction] = recalibrate_batchnorm(small, case.images, images=images, forward=case.forward)
        return pruned


def _producers(group: ChannelGroup) -> list[str]:
    return list(dict.fromkeys(m.layer for m in group.side("out")))


def _ratio(case: Case, groups: Sequence[ChannelGroup], fraction: float) -> float | None:
    """The smallest of 200 ratios that meets the fraction; NNI rounds the channels that leave down."""
    cost = macs(case.trace)
    for step in range(_STEPS):
        ratio = step / _STEPS
        widths = {**case.trace.base_widths, **{g.name: g.channels - int(g.channels * ratio) for g in groups}}
        if cost.cost(widths) <= fraction * cost.base:
            return ratio
    return None


def _evaluator(model: nn.Module, case: Case) -> Any:
    """Runs the calibration images forward and backward at a learning rate of 0: gradients, and no training."""
    import nni
    from nni.compression import TorchEvaluator

    def step(batch: Any, model: nn.Module, *_: Any) -> torch.Tensor:
        return F.cross_entropy(case.forward(model, batch), case.get_labels(batch))

    def run(model: nn.Module, optimizer: Any, step: Any, _lr: Any = None, max_steps: Any = None, *_: Any,
            **__: Any) -> None:  # fmt: skip
        for taken, batch in enumerate(case.images):
            if taken == max_steps:
                return
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    return TorchEvaluator(run, nni.trace(torch.optim.SGD)(model.parameters(), lr=0.0), step)


def _by_weights(name: str) -> Callable[..., Any]:
    def make(model: nn.Module, config: list[dict[str, Any]], _case: Case) -> Any:
        from nni.compression import pruning

        return getattr(pruning, name)(model, config)

    return make


def _taylor(model: nn.Module, config: list[dict[str, Any]], case: Case) -> Any:
    from nni.compression.pruning import TaylorPruner

    return TaylorPruner(model, config, evaluator=_evaluator(model, case), training_steps=len(case.images))


def _di(model: nn.Module, config: list[dict[str, Any]], case: Case) -> Any:
    import diplugin

    return diplugin.DIPruner(model, config, calibration_data=case.images, get_labels=case.get_labels)


def nni_contenders() -> list[NNIPruner]:
    """L1, FPGM and Taylor of NNI, and ours in the same place."""
    return [NNIPruner("NNI L1", _by_weights("L1NormPruner")), NNIPruner("NNI FPGM", _by_weights("FPGMPruner")),
            NNIPruner("NNI Taylor", _taylor), NNIPruner("NNI DIPruner", _di)]  # fmt: skip
