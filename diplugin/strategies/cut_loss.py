"""What a cut network really loses: cut, refitted, and judged on images that were set aside.

The images are read in disguise: the unpruned network knows them by heart, and how much of its memory a cut leaves is
not what decides after recovery.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..accuracy import check_fit
from ..disguise import Disguised
from ..errors import DataError
from ..features import Forward, GetLabels, device_of, to_device
from ..modes import evaluating
from ..network import NetworkTrace
from ..plan import PruningPlan
from ..recovery import Cut, Reconstruct, label_loss
from ..team import current_team
from .one_shot import first_images


@dataclass(frozen=True)
class CutLoss:
    """What a plan's network loses: cut, refitted and judged by its loss on disguised images.

    Attributes:
        model: the unpruned network.
        images: training batches for the refit.
        judged: labelled batches that are not among `images`.
        most: images of `judged` that are read.
    """

    model: nn.Module
    trace: NetworkTrace
    images: Iterable[Any]
    judged: Iterable[Any]
    get_labels: GetLabels
    forward: Forward
    most: int = 3000

    def __call__(self, plan: PruningPlan) -> float:
        """The mean loss by the labels; of many processes each reads some of the batches, and all get one figure.

        Raises:
            DataError: no images to judge by, or labels that do not fit the outputs.
        """
        model = Reconstruct().repaired(Cut(self.model, self.images, self.trace, plan, forward=self.forward))
        team, sums = current_team(self.judged), torch.zeros(2, dtype=torch.float64)
        with evaluating(model), torch.no_grad(), team.together():
            for turn, batch in enumerate(Disguised(first_images(self.judged, self.most))):
                if team.mine(turn):
                    batch = to_device(batch, device_of(model))
                    labels, logits = self.get_labels(batch), self.forward(model, batch)
                    check_fit(logits, labels)
                    sums += torch.tensor([float(label_loss(logits, labels)) * len(labels), len(labels)])
        team.sum([sums])
        if not sums[1]:
            raise DataError("expected images to judge cuts by, got none")
        return float(sums[0] / sums[1])
