"""What identifies an operator in a latency table, and the sizes and counts that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

_WEIGHT_BYTES = {"float32": 4, "int8": 1}


@dataclass(frozen=True, order=True)
class OpKey:
    """What identifies an operator: never a layer's name.

    Attributes:
        op: "conv", "conv_transpose" or "linear", with its fused normalisation.
        cin, cout: channels read and written.
        kernel, stride, padding, dilation: one number per spatial dimension, empty for "linear".
        groups: `cin` for a depthwise convolution.
        size: spatial size of the input, (H, W); the number of rows, (1,) or (tokens,), for "linear".
        activation: the fused one ("relu", …), "" for none.
        batch: images at once.
        dtype: "float32" or "int8" (quantized weights and activations).
        layout: of the runtime's input, "NCHW".

    >>> OpKey("conv", 16, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8), "relu").text
    'conv+relu 16>32 k3x3 s1x1 p1x1 d1x1 g1 @8x8 b1 float32 NCHW'
    """

    op: str
    cin: int
    cout: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    size: tuple[int, ...] = (1,)
    activation: str = ""
    batch: int = 1
    dtype: str = "float32"
    layout: str = "NCHW"

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.cin == self.cout

    @property
    def family(self) -> OpKey:
        """The same operator with its widths left open: the entries that a lookup may round up among."""
        return replace(self, cin=0, cout=0, groups=-1 if self.depthwise else self.groups)

    @property
    def text(self) -> str:
        """One line for people and for error messages."""
        activation = f"+{self.activation}" if self.activation else ""
        sides = {"k": self.kernel, "s": self.stride, "p": self.padding, "d": self.dilation}
        shape = [f"{letter}{_by(values)}" for letter, values in sides.items() if values]
        words = [f"{self.op}{activation}", f"{self.cin}>{self.cout}", *shape, f"g{self.groups}",
                 f"@{_by(self.size)}", f"b{self.batch}", self.dtype, self.layout]  # fmt: skip
        return " ".join(words)

    @property
    def row(self) -> list[Any]:
        """The key as JSON types, in the order of the fields; `from_row` gives it back."""
        return [list(v) if isinstance(v, tuple) else v for v in (getattr(self, f.name) for f in fields(self))]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> OpKey:
        """The key of a row of checked JSON values."""
        values: list[Any] = [tuple(v) if isinstance(v, list) else v for v in row]
        return cls(*values)

    @property
    def macs(self) -> float:
        """Multiply-accumulates."""
        positions = self.size if self.op == "conv_transpose" else self.output_size
        return float(self.batch * prod(positions) * prod(self.kernel) * self.cin * self.cout // self.groups)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take; the few of the biases are left out.

        >>> OpKey("conv", 32, 32, (3, 3), (1, 1), (1, 1), (1, 1), 32, (8, 8)).weight_bytes
        1152
        """
        return prod(self.kernel) * self.cin * self.cout // self.groups * _WEIGHT_BYTES.get(self.dtype, 4)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        if self.op == "linear":
            return self.size
        sides = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        if self.op == "conv_transpose":
            return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sides)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)


def _by(values: Iterable[int]) -> str:
    return "x".join(map(str, values))
