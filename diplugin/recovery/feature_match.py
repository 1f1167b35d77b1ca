"""Matching penultimate features where it matters: inside the teacher's discriminant subspace (our reading).

What the classifier reads is matched along the few directions in which the teacher's features tell the classes apart,
and nowhere else: a smaller network has no room to copy what labels do not ask for. Where channels of the penultimate
features themselves were removed, the directions are those of the channels that stay, which are the same channels in
both networks.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..discriminant import discriminant_directions
from ..errors import ModelError
from ..features import Forward, GetLabels, chunks, device_of, forward_inputs, labels_of, to_device
from ..modes import evaluating
from ..network import NetworkTrace
from ..plan import PruningPlan
from .losses import feature_loss
from .settings import Distillation, Range, check_numbers

_RANGES: dict[str, Range] = {
    "teacher_weight": ("above 0 and up to 1", lambda x: 0 < x <= 1),
    "feature_weight": ("of 0 or more and finite", lambda x: 0 <= x < math.inf),
    "rho": ("above 0 and finite", lambda x: 0 < x < math.inf),
    "images": ("as a whole number of 2 or more", lambda n: isinstance(n, numbers.Integral) and int(n) >= 2),
}


@dataclass(frozen=True)
class FeatureDistillation(Distillation):
    """Distillation that also matches the penultimate features in the teacher's discriminant subspace.

    Attributes:
        feature_weight: of the match, in addition to the losses of labels and logits.
        rho: relative ridge of the directions.
        images: training images that the directions are computed from.
    """

    feature_weight: float = 0.5
    rho: float = 10.0
    images: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, _RANGES)


@contextmanager
def matching(
    student: nn.Module,
    teacher: nn.Module,
    trace: NetworkTrace,
    plan: PruningPlan,
    loader: Iterable[Any],
    settings: FeatureDistillation,
    *,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
) -> Iterator[Callable[[], Tensor]]:
    """For the time of the block: the loss to be added once student and teacher have run on a batch.

    Args:
        student: the teacher pruned by `plan`.
        trace: of the teacher.
        loader: training data for the directions.

    Raises:
        ModelError: the network has no layer that reads penultimate features.
        DataError: features or labels that cannot be used.
    """
    layer = classifier_of(trace)
    kept = torch.tensor(_kept_inputs(trace, plan, layer), device=device_of(teacher))
    with _read(teacher, layer) as of_teacher, _read(student, layer) as of_student:
        features, labels = _collected(teacher, loader, of_teacher, settings.images, get_labels, forward)
        weighting = "balanced" if labels.ndim == 1 else None
        directions = discriminant_directions(features[:, kept], labels, settings.rho, class_weight=weighting).float()

        def loss() -> Tensor:
            target = of_teacher[0][:, kept]
            return settings.feature_weight * feature_loss(of_student[0], target, directions.to(target))

        yield loss


def classifier_of(trace: NetworkTrace) -> str:
    """The layer that reads the penultimate features: the last convolution or linear layer that runs.

    Raises:
        ModelError: there is none.
    """
    layer = next((layer.name for layer in reversed(trace.layers) if layer.op in ("linear", "conv")), None)
    if layer is None:
        raise ModelError("expected a network that ends in a linear layer or a convolution to match features of")
    return layer


def _kept_inputs(trace: NetworkTrace, plan: PruningPlan, layer: str) -> list[int]:
    """The unpruned layer's input channels that the plan keeps."""
    gone = trace.channels_of(plan.removed, "in").get(layer, ())
    width = next(spec.in_channels for spec in trace.layers if spec.name == layer)
    return [c for c in range(width) if c not in gone]


@contextmanager
def _read(model: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """What a layer read last, pooled to [N, C], as the only item of a list."""
    module, seen = model.get_submodule(layer), []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        x = x if isinstance(module, nn.Linear) else x.movedim(1, -1)
        seen[:] = [x.flatten(1, -2).mean(1) if x.ndim > 2 else x]

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _collected(
    teacher: nn.Module, loader: Iterable[Any], seen: list[Tensor], images: int, get_labels: GetLabels, forward: Forward
) -> tuple[Tensor, Tensor]:
    """The teacher's pooled features [N, C] on training images, and their labels."""
    features, labels, count = [], [], 0
    with evaluating(teacher), torch.no_grad():
        for batch in chunks(loader):
            batch = to_device(batch, device_of(teacher))
            forward(teacher, batch)
            features.append(seen[0])
            labels.append(get_labels(batch))
            count += len(labels[-1])
            if count >= images:
                break
    return torch.cat(features), torch.cat(labels)
