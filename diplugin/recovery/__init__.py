"""Recovery: what a pruned network needs to be itself again, from cheap to dear."""

from .batchnorm import recalibrate_batchnorm
from .compensation import compensate
from .losses import label_loss, teacher_loss
from .training import Distillation, EpochReport, FineTuning, train

__all__ = [
    "Distillation",
    "EpochReport",
    "FineTuning",
    "compensate",
    "label_loss",
    "recalibrate_batchnorm",
    "teacher_loss",
    "train",
]
