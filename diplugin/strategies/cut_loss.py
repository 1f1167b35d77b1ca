"""What a cut network really loses: cut, refitted, and judged on images that were set aside.

Images are read in disguise: the unpruned network knows them by heart, and how much of its memory a cut leaves is not
what decides after recovery.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..accuracy import check_fit
from ..disguise import Disguised
from ..errors import DataError, PlanError
from ..features import Forward, GetLabels, device_of, to_device
from ..modes import evaluating
from ..network import NetworkTrace
from ..plan import PruningPlan
from ..recovery import Cut, Reconstruct, Repair, label_loss
from ..run_folder import read_json
from ..team import current_team
from ..whole_files import write_json


@dataclass(frozen=True)
class CutLoss:
    """The loss, by the labels, of the network that a plan cuts.

    Attributes:
        model: the unpruned network.
        images: training batches for the refit.
        judged: labelled batches that are not among `images`.
        refit: what is done to a cut network before it is judged.
        disguise: whether images [N, C, H, W] are turned, scaled and lit differently before they are read.
    """

    model: nn.Module
    trace: NetworkTrace
    images: Iterable[Any]
    judged: Iterable[Any]
    get_labels: GetLabels
    forward: Forward
    refit: Repair = field(default_factory=Reconstruct)
    disguise: bool = True

    def __call__(self, plan: PruningPlan) -> float:
        """The mean over all images; of many processes each reads some of the batches, and all get one figure.

        Raises:
            DataError: no images to judge by, or labels that do not fit the outputs.
        """
        with torch.random.fork_rng():  # data that vary at random vary alike in every trial
            torch.manual_seed(0)
            model = self.refit.repaired(Cut(self.model, self.images, self.trace, plan, forward=self.forward))
            total, images = self._sums(model)
        if not images:
            raise DataError("expected images to judge cuts by, got none")
        return total / images

    def _sums(self, model: nn.Module) -> tuple[float, float]:
        """Loss times images, and images."""
        team, sums = current_team(self.judged), torch.zeros(2, dtype=torch.float64)
        with evaluating(model), torch.no_grad(), team.together():
            for turn, batch in enumerate(Disguised(self.judged) if self.disguise else self.judged):
                if team.mine(turn):
                    batch = to_device(batch, device_of(model))
                    labels, logits = self.get_labels(batch), self.forward(model, batch)
                    check_fit(logits, labels)
                    if len(labels):  # the mean over no image is no number
                        sums += torch.tensor([float(label_loss(logits, labels)) * len(labels), len(labels)])
        team.sum([sums])
        return float(sums[0]), float(sums[1])


class Remembered:
    """Losses of plans, each measured once; a file keeps them, so that a run taken up again does not measure anew.

    Raises:
        PlanError: a file that holds something else.
    """

    def __init__(self, loss_of: Callable[[PruningPlan], float], path: Path) -> None:
        self._loss_of, self._path = loss_of, path
        self._known: dict[str, Any] = read_json(path) if path.exists() else {}
        if not all(loss is None or isinstance(loss, (int, float)) for loss in self._known.values()):
            raise PlanError(f"expected losses of trial cuts in {path}, got something else; remove it to measure anew")

    def __call__(self, plan: PruningPlan) -> float:
        key = hashlib.sha256(json.dumps(sorted(plan.kept.items())).encode()).hexdigest()
        if key not in self._known:
            loss = self._loss_of(plan)
            self._known[key] = loss if math.isfinite(loss) else None
            write_json(self._path, self._known)
        loss = self._known[key]
        return math.inf if loss is None else loss
