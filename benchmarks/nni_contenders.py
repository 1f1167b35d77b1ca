"""NNI's own pruners as contenders: one sparsity for every layer, removed for real by `diplugin_nni.speedup`.

They rank the outputs of single layers, so they run on groups with one producer, which is every group inside a residual
block. The sparsity is the smallest that meets the target, found on predicted costs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
    """One of `nni.compression.pruning`'s classes by name; `gradients` of the calibration images if it reads them."""

    name: str
    pruner: str
    gradients: bool = False

    def prune(self, case: Case, fractions: Sequence[float]) -> dict[float, nn.Module | None]:
        import diplugin_nni
        from nni.compression import pruning

        groups = {g: producers[0] for g in case.trace.prunable if len(producers := _producers(g)) == 1}
        pruned: dict[float, nn.Module | None] = {}
        for fraction in fractions:
            ratio = _ratio(case, list(groups), fraction)
            if ratio is None:
                pruned[fraction] = None
                continue
            model = copy.deepcopy(case.model)
            config = [{"op_names": list(groups.values()), "sparse_ratio": ratio}]
            more = {"evaluator": _evaluator(model, case), "training_steps": len(case.images)} if self.gradients else {}
            _, masks = getattr(pruning, self.pruner)(model, config, **more).compress()
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


def nni_contenders() -> list[NNIPruner]:
    """L1, FPGM and Taylor of NNI."""
    return [NNIPruner("NNI L1", "L1NormPruner"), NNIPruner("NNI FPGM", "FPGMPruner"),
            NNIPruner("NNI Taylor", "TaylorPruner", gradients=True)]  # fmt: skip
