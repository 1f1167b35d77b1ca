"""What the smaller network is trained towards: the labels, and what the unpruned network says.

Both losses follow from what the outputs stand for, and that from the labels: the choice of one label of several
(`Categorical`), labels that are there or not, each by itself (`Bernoulli`), or real values (`Real`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from ..accuracy import of_one_label

#: Of facts that hold of some images, those that hold of all.
Everywhere = Callable[[list[bool]], list[bool]]


class OutputKind(Protocol):
    """What outputs stand for."""

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """The mean over images."""
        ...

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
        """How far the outputs are from the teacher's; 0 where they are the same."""
        ...


class Categorical:
    """One label of several: cross-entropy, and the divergence of softened outputs."""

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        labels = labels.to(logits.dtype) if labels.shape == logits.shape else labels
        return F.cross_entropy(logits, labels.long() if labels.ndim == 1 else labels, label_smoothing=smoothing)

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
        return teacher_loss(logits, teacher_logits, temperature)


class Bernoulli:
    """Labels that are there or not: binary cross-entropy, and the divergence of each softened output by itself."""

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
        told = teacher_logits / temperature
        cross = F.binary_cross_entropy_with_logits(logits / temperature, told.sigmoid())
        return (cross - F.binary_cross_entropy_with_logits(told, told.sigmoid())) * temperature**2


class Real:
    """Real values: squared error."""

    def label_loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        return F.mse_loss(logits, labels.to(logits.dtype))

    def teacher_loss(self, logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0) -> Tensor:
        return F.mse_loss(logits, teacher_logits)


def output_kind(logits: Tensor, labels: Tensor, everywhere: Everywhere = lambda facts: facts) -> OutputKind:
    """By the kind of labels.

    One label of several for class ids [N] and soft labels [N, L], whose rows are probabilities that sum to one (as
    mixed or smoothed labels are); there or not for 0/1 targets [N, L]; real values for all others.

    Args:
        everywhere: asked where the images are but a part of a batch, for what holds of all its parts.
    """
    if labels.ndim == 1 or labels.shape != logits.shape:
        return Categorical()
    facts = [bool(((labels == 0) | (labels == 1)).all()), labels.ndim == 2 and bool(of_one_label(labels).all())]
    there_or_not, of_one = everywhere(facts)
    if there_or_not:
        return Bernoulli()
    return Categorical() if of_one else Real()


def label_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, binary cross-entropy or squared error, by the kind of labels: see `output_kind`."""
    return output_kind(logits, labels).label_loss(logits, labels, smoothing)


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
