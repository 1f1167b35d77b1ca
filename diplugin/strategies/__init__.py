"""Ways to combine scoring, search, surgery and recovery."""

from .clock import search_by_clock
from .cut_loss import CutLoss
from .job import Job, Shrunk
from .measured_cuts import MeasuredCuts
from .one_shot import OneShot, Strategy, first_images
from .schedules import Geometric, Linear, Schedule
from .structure_distillation import StructureDistillation

__all__ = [
    "CutLoss",
    "Geometric",
    "Job",
    "Linear",
    "MeasuredCuts",
    "OneShot",
    "Schedule",
    "Shrunk",
    "Strategy",
    "StructureDistillation",
    "first_images",
    "search_by_clock",
]
