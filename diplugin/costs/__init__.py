"""What a structure costs, predicted from kept channel counts, and the budgets that limit it."""

from .arithmetic import PeakActivationMemory, layer_macs, macs, params
from .base import CostModel, SeparableCost, Step, Term, Widths
from .budget import Budget
from .latency import LatencyCost

__all__ = [
    "Budget",
    "CostModel",
    "LatencyCost",
    "PeakActivationMemory",
    "SeparableCost",
    "Step",
    "Term",
    "Widths",
    "layer_macs",
    "macs",
    "params",
]
