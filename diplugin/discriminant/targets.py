"""Labels of any form become one matrix: centred targets Y [N, L] in float64.

Class ids turn into one column a class; one-hot, multi-label and real targets (a teacher's logits) are taken as they
are. `class_weight="balanced"` scales the raw columns by 1/√n_k before centring, which makes DI the trace of linear
discriminant analysis, in which every class counts the same; without it the classes are weighted by their size.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from diplugin.errors import DataError, DISaturationWarning, UserError

SATURATION = 0.98


def label_targets(labels: Tensor, *, num_classes: int | None = None, class_weight: str | None = None) -> Tensor:
    """Centred float64 targets [N, L] of class ids [N] or of a target matrix [N, L].

    Args:
        labels: class ids [N] (integers or bools), or one-hot, multi-label or real targets [N, L].
        num_classes: L for class ids; None makes one column for every class that occurs (a class that does not occur
            has a column of zeros and adds nothing to DI).
        class_weight: None, or "balanced" for class ids and 0/1 columns.

    Raises:
        DataError: labels of the wrong shape or kind, fewer than two, out of range, not finite, or without variance.

    >>> label_targets(torch.tensor([0, 1, 1, 0]))
    tensor([[ 0.5000, -0.5000],
            [-0.5000,  0.5000],
            [-0.5000,  0.5000],
            [ 0.5000, -0.5000]], dtype=torch.float64)
    """
    if class_weight not in (None, "balanced"):
        raise UserError(f"class_weight is None or 'balanced', got {class_weight!r}")
    labels = torch.as_tensor(labels).detach()
    if labels.ndim not in (1, 2):
        raise DataError(f"labels are class ids [N] or targets [N, L], got shape {list(labels.shape)}: reshape them")
    if labels.shape[0] < 2:
        raise DataError(f"label information needs two images or more, got {labels.shape[0]}: use a larger batch")
    raw = _one_hot(labels, num_classes) if labels.ndim == 1 else _target_matrix(labels)
    if class_weight == "balanced":
        raw = _balanced(raw)
    targets = raw - raw.mean(dim=0)
    # Rounding leaves a constant column not quite at zero once its mean is gone.
    if targets.numel() == 0 or bool((targets.abs().amax(0) <= 1e-12 * raw.abs().amax(0)).all()):
        raise DataError(f"all {len(labels)} labels are the same: give images of two classes or more, shuffled")
    return targets


def check_length(features: Tensor, targets: Tensor) -> None:
    """Raise DataError unless there is one row of targets for every image."""
    if features.shape[0] != targets.shape[0]:
        raise DataError(
            f"one label an image is needed: got {features.shape[0]} feature maps and {targets.shape[0]} labels"
        )


def check_positive(value: float, name: str) -> float:
    """`value` as a float, if it is finite and above zero."""
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"{name} is a finite number above 0, got {value}")
    return number


def warn_if_saturated(di: float, where: str = "the features") -> None:
    """Warn when DI exceeds .98: nearly everything is explained, so the ranking of channels is mostly noise."""
    if di > SATURATION:
        message = f"DI of {where} is {di:.3f}, so near 1 that scores rank noise: use more images or a larger rho"
        warnings.warn(message, DISaturationWarning, stacklevel=3)


def unit_targets(targets: Tensor) -> Tensor:
    """Targets scaled to ‖Y‖ = 1, with no more columns than images; every DI quantity keeps its value.

    DI sees Y only through YYᵀ, so columns of zeros may go, and more than N columns may be replaced by N.
    """
    scaled = targets / targets.abs().max()
    scaled = scaled[:, scaled.abs().amax(0) > 0]
    if scaled.shape[1] > scaled.shape[0]:
        values, vectors = torch.linalg.eigh(scaled @ scaled.T)
        keep = values > values[-1] * 1e-14
        scaled = vectors[:, keep] * values[keep].sqrt()
    return scaled / scaled.norm()


def _one_hot(ids: Tensor, num_classes: int | None) -> Tensor:
    if ids.is_floating_point() or ids.is_complex():
        raise DataError(f"class ids are integers, got {ids.dtype}: pass integers, or real targets as a matrix [N, L]")
    ids = ids.long()
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise DataError(f"class ids start at 0, got {low}: drop images without a label")
    if num_classes is not None and high >= num_classes:
        raise DataError(f"class ids lie below num_classes={num_classes}, got {high}: check the labels")
    if num_classes is None:
        ids = torch.unique(ids, return_inverse=True)[1]
        num_classes = int(ids.max()) + 1
    return torch.nn.functional.one_hot(ids, num_classes).double()


def _target_matrix(targets: Tensor) -> Tensor:
    if targets.is_complex():
        raise DataError("targets are real numbers, got complex ones: pass their real form")
    raw = targets.double()
    if not bool(torch.isfinite(raw).all()):
        raise DataError("labels contain NaN or infinity: remove those images")
    return raw


def _balanced(raw: Tensor) -> Tensor:
    if not bool(((raw == 0) | (raw == 1)).all()):
        raise DataError("class_weight='balanced' needs class ids or 0/1 targets, got real targets: use None")
    return raw / raw.sum(dim=0).clamp(min=1).sqrt()
