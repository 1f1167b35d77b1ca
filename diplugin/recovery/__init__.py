"""Recovery: what a pruned network needs to be itself again, from cheap to dear."""

from .batchnorm import recalibrate_batchnorm
from .compensation import compensate
from .feature_match import FeatureDistillation, matching
from .losses import feature_loss, label_loss, teacher_loss
from .reconstruction import Reconstruction, reconstruct
from .repair import REPAIRS, Compensate, Cut, Recalibrate, Reconstruct, Repair, best_repair
from .settings import Distillation, FineTuning
from .training import EpochReport, check_trainable, train

__all__ = [
    "REPAIRS",
    "Compensate",
    "Cut",
    "Distillation",
    "EpochReport",
    "FeatureDistillation",
    "FineTuning",
    "Recalibrate",
    "Reconstruct",
    "Reconstruction",
    "Repair",
    "best_repair",
    "check_trainable",
    "compensate",
    "feature_loss",
    "label_loss",
    "matching",
    "recalibrate_batchnorm",
    "reconstruct",
    "teacher_loss",
    "train",
]
