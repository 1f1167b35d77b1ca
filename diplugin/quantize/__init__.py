"""Mixed precision inside a layer: each output channel has its own bits out of 0, 2, 4, 8, and a runtime loads the file.

    fold BatchNorm → observe calibration images → damage of every channel at every width → bits under a budget
    → round → (fine-tune) → ONNX

Discriminant Information says how much label information the rounding of a channel disturbs, in one unit for all layers.
The fake-quantized torch model and the ONNX file compute the same numbers, to the last bit in most cases: see `grid`.
Size is gained by it. Speed is not on common CPUs: measure it.
"""

from __future__ import annotations

from .allocation import BitAllocation
from .export import QuantizedExport, export_model
from .grid import ChannelScales, TensorScale
from .layouts import JoinedWeights, SplitLayers
from .rounding import CompensatedRounding, NearestRounding
from .run import QuantizedResult, Quantizer, export_quantized, quantize
from .run_folder import quantize_run, read_bits
from .settings import Bits, EndLayers
from .strategies import DIBits, MagnitudeBits, OutputErrorBits, RandomBits, UniformBits

__all__ = [
    "BitAllocation",
    "Bits",
    "ChannelScales",
    "CompensatedRounding",
    "DIBits",
    "EndLayers",
    "JoinedWeights",
    "MagnitudeBits",
    "NearestRounding",
    "OutputErrorBits",
    "QuantizedExport",
    "QuantizedResult",
    "Quantizer",
    "RandomBits",
    "SplitLayers",
    "TensorScale",
    "UniformBits",
    "export_model",
    "export_quantized",
    "quantize",
    "quantize_run",
    "read_bits",
]
