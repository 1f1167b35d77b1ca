"""What a bit allocation costs: bytes of the ONNX file, and bit operations.

The bytes of the file are known before it is written: what does not depend on the bits is taken from one file with 8
bits everywhere, the rest follows from counts of channels. Bit operations are multiply-accumulates times the bits of
both factors, batch 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .allocation import Widths
from .grid import BIT_WIDTHS

ACTIVATION_BITS = 8


@dataclass(frozen=True)
class LayerShape:
    """A quantized layer: output channels, weights and multiply-accumulates per output channel (one image)."""

    channels: int
    weights: int
    macs: float


class Overhead(Protocol):
    """Bytes that a file layout spends on a layer beside its weights and scales."""

    def __call__(self, bits: np.ndarray) -> float: ...


@dataclass(frozen=True)
class FileSize:
    """`size_mb`: the ONNX file in 10^6 bytes; `fixed` MB do not depend on the bits."""

    layers: Mapping[str, LayerShape]
    overhead: Overhead
    fixed: float = 0.0
    name: str = "size_mb"

    def channel(self, layer: str, width: int) -> float:
        return (self.layers[layer].weights * width / 8 + 4 * (width > 0)) / 1e6

    def layer(self, layer: str, bits: np.ndarray) -> float:
        counts = {b: int((bits == b).sum()) for b in BIT_WIDTHS if b}
        weights = sum(-(-n * self.layers[layer].weights * b // 8) + 4 * n for b, n in counts.items())
        return (weights + self.overhead(bits)) / 1e6

    def total(self, bits: Widths) -> float:
        return self.fixed + sum(self.layer(layer, widths) for layer, widths in bits.items())


@dataclass(frozen=True)
class BitOperations:
    """`bops`: multiply-accumulates × weight bits × activation bits (8), one image."""

    layers: Mapping[str, LayerShape]
    name: str = "bops"

    def channel(self, layer: str, width: int) -> float:
        return self.layers[layer].macs * width * ACTIVATION_BITS

    def layer(self, layer: str, bits: np.ndarray) -> float:
        return float(bits.sum()) * self.layers[layer].macs * ACTIVATION_BITS

    def total(self, bits: Widths) -> float:
        return sum(self.layer(layer, widths) for layer, widths in bits.items())
