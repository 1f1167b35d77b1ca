"""Measuring latency: what to profile, on which device, and how a sum of entries becomes a prediction."""

from .finish import finish, load_bundle
from .grid import width_grid
from .local import profile_here
from .onnx_timing import OnnxTiming, measure_onnx, measure_side_by_side
from .plan import ProfilePlan, Protocol, make_plan, runtime_setting

__all__ = [
    "OnnxTiming",
    "ProfilePlan",
    "Protocol",
    "finish",
    "load_bundle",
    "make_plan",
    "measure_onnx",
    "measure_side_by_side",
    "profile_here",
    "runtime_setting",
    "width_grid",
]
