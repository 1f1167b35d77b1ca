"""How often a network is right: the one figure that every stage is judged by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DataError, ModelError
from .features import Forward, GetLabels, device_of, forward_inputs, labels_of, to_device
from .modes import evaluating
from .team import current_team


def accuracy(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
) -> float:
    """Fraction of images classified correctly, in eval mode; modes are as before afterwards.

    Class ids [N], one-hot targets [N, L] and soft labels (rows of probabilities) are compared with the largest logit,
    multi-label targets with the signs of the logits, label by label; 0/1 targets are one-hot if every image of the data
    has one label of several. Real values, such as another network's logits, are compared by the largest of a row, those
    of a single column by their signs. Targets with positions [N, L, ...] are judged position by position. Where
    `torch.distributed` is initialised every process runs some of the batches, and all get the same figure.

    Raises:
        DataError: an empty loader, or labels that do not fit the outputs.
        ModelError: the model returns something else than one tensor of logits.
    """
    team, tally = current_team(loader), Tally()
    with evaluating(model), torch.no_grad(), team.together():
        for turn, batch in enumerate(loader):
            if not team.mine(turn):
                continue
            batch = to_device(batch, device_of(model))
            labels = get_labels(batch)  # first: a batch of another form is the data's fault, not the model's
            tally.add(forward(model, batch), labels)
    team.sum([tally.counts])
    return tally.fraction


class Tally:
    """Counts of what was right, batch by batch.

    Attributes:
        counts: float64; right and all images (or their positions) by their largest logit, right and all labels by the
            logits' signs, images that have not exactly one label, and those that have none but several real values.
            Those of several tallies may be added up.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(6, dtype=torch.float64)

    def add(self, logits: Any, labels: Tensor) -> None:
        """One more batch: logits [N, C] and class ids [N], or logits and targets of one shape [N, C, ...].

        Raises:
            DataError: labels that do not fit the logits.
            ModelError: no tensor of logits.
        """
        check_fit(logits, labels)
        if labels.ndim == 1:
            found = [(logits.argmax(1) == labels).sum(), len(labels), 0, 0, 0, 0]
        else:
            # Whole numbers are no logits: -1 stands for a label that nobody knows, say.
            real = ((labels < 0) | (labels > 1)).any(1) & (labels != labels.round()).any(1)
            largest = (logits.argmax(1) == labels.argmax(1)).sum()
            signs = ((logits > 0) == (labels > (0.0 if bool(real.any()) else 0.5))).sum()
            several = real.sum() if labels.shape[1] > 1 else 0
            found = [largest, labels[:, 0].numel(), signs, labels.numel(), (~of_one_label(labels)).sum(), several]
        self.counts += torch.tensor([float(x) for x in found], dtype=torch.float64)

    @property
    def fraction(self) -> float:
        """Right over all: of images, or of labels where an image may have several of them.

        Raises:
            DataError: nothing was counted.
        """
        images, all_images, signs, all_signs, shared, real = self.counts.tolist()
        right, total = (signs, all_signs) if shared and not real else (images, all_images)
        if not total:
            raise DataError("expected a loader that yields images to judge by, got an empty one")
        return right / total


def of_one_label(targets: Tensor) -> Tensor:
    """Whether each row of targets [N, L, ...] sums to one, as the probabilities of an image's one label do.

    A column of its own is no choice among labels, and never of one.

    >>> of_one_label(torch.tensor([[0.9, 0.05, 0.05], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [-1.0, 2.0, 0.0]]))
    tensor([ True,  True, False, False])
    """
    sums_to_one = (targets.float().sum(1) - 1).abs() <= 1e-3  # rounded sums are one, too
    return (targets >= 0).all(1) & sums_to_one & (targets.shape[1] > 1)


def check_fit(logits: Any, labels: Tensor) -> None:
    """Raise unless these logits can be judged by these labels."""
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"expected a model that returns one tensor of logits, got {type(logits).__name__}; "
            "pass forward= that picks the logits"
        )
    if len(logits) != len(labels) or logits.ndim < 2:
        raise DataError(f"expected logits [N, classes] for {len(labels)} labels, got {list(logits.shape)}")
    if labels.ndim != 1:
        if labels.shape != logits.shape:
            raise DataError(f"expected targets of the logits' shape {list(logits.shape)}, got {list(labels.shape)}")
        return
    if logits.ndim != 2:
        raise DataError(f"expected logits [N, classes] for {len(labels)} labels, got {list(logits.shape)}")
    if labels.is_floating_point():
        raise DataError(f"expected class ids as integers, got {labels.dtype}")
    if len(labels) and (int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0):
        raise DataError(
            f"expected class ids from 0 to {logits.shape[1] - 1} for this model, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
