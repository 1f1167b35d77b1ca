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

    Class ids [N] and one-hot targets [N, L] are compared with the largest logit, multi-label targets with the signs of
    the logits, label by label. Where `torch.distributed` is initialised every process runs some of the batches, and all
    get the same figure.

    Raises:
        DataError: an empty loader, or labels that do not fit the outputs.
        ModelError: the model returns something else than one tensor of logits.
    """
    team = current_team(loader)
    right = total = 0.0
    with evaluating(model), torch.no_grad(), team.together():
        for turn, batch in enumerate(loader):
            if not team.mine(turn):
                continue
            batch = to_device(batch, device_of(model))
            labels = get_labels(batch)  # first: a batch of another form is the data's fault, not the model's
            hits = hits_of(forward(model, batch), labels)
            right, total = right + float(hits.sum()), total + hits.numel()
    counts = torch.tensor([right, total], dtype=torch.float64)
    team.sum([counts])
    right, total = counts.tolist()
    if not total:
        raise DataError("expected a loader that yields images to judge by, got an empty one")
    return right / total


def hits_of(logits: Any, labels: Tensor) -> Tensor:
    """1 where the prediction is right, else 0: float [N], or [N, L] for multi-label targets."""
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"expected a model that returns one tensor of logits, got {type(logits).__name__}; "
            "pass forward= that picks the logits"
        )
    if len(logits) != len(labels) or logits.ndim < 2:
        raise DataError(f"expected logits [N, classes] for {len(labels)} labels, got {list(logits.shape)}")
    if labels.ndim == 1:
        if labels.is_floating_point():
            raise DataError(f"expected class ids as integers, got {labels.dtype}")
        if int(labels.max()) >= logits.shape[1] or int(labels.min()) < 0:
            raise DataError(
                f"expected class ids from 0 to {logits.shape[1] - 1} for this model, "
                f"got {int(labels.min())} to {int(labels.max())}"
            )
        return (logits.argmax(1) == labels).float()
    if labels.shape != logits.shape:
        raise DataError(f"expected targets of the logits' shape {list(logits.shape)}, got {list(labels.shape)}")
    if bool((labels.sum(1) == 1).all()):
        return (logits.argmax(1) == labels.argmax(1)).float()
    return ((logits > 0) == (labels > 0.5)).float()
