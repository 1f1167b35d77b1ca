"""What the smaller network is trained towards: the labels, and what the unpruned network says."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..accuracy import of_one_label


def label_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """By the kind of labels.

    Cross-entropy for class ids [N] and soft labels [N, L], whose rows are probabilities that sum to one (as mixed or
    smoothed labels are); binary cross-entropy for 0/1 targets [N, L]; squared error for other real ones.
    """
    if labels.ndim == 1 or labels.shape != logits.shape:
        return F.cross_entropy(logits, labels.long() if labels.ndim == 1 else labels, label_smoothing=smoothing)
    if bool(((labels == 0) | (labels == 1)).all()):
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    labels = labels.to(logits.dtype)
    if labels.ndim == 2 and bool(of_one_label(labels).all()):
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    return F.mse_loss(logits, labels)


def teacher_loss(logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
    """Kullback-Leibler divergence of softened outputs, times temperature² so that its gradient keeps its size.

    Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    target = F.log_softmax(teacher_logits / temperature, dim=-1)
    return F.kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(features: Tensor, teacher_features: Tensor, directions: Tensor) -> Tensor:
    """Mean squared difference of two networks' features [N, C] along the given directions [C, k]; the rest is free.

    Along `discriminant_directions` of the teacher's features its unit is the teacher's variance: a student that says
    the same of every image is at about 1.
    """
    return ((features - teacher_features) @ directions).square().mean()
