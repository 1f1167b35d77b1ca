"""Ways to combine scoring, search, surgery and recovery."""

from .clock import search_by_clock
from .cut_loss import CutLoss
from .job import Job, Shrunk
from .measured_cuts import MeasuredCuts
from .one_shot import OneShot, Strategy
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
    "search_by_clock",
]
