"""What can be asked of quantization, as one frozen object: `Bits`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..costs import Budget
from ..errors import BudgetError, UserError
from ..recovery import FineTuning
from .grid import BIT_WIDTHS, ChannelScales, Scales
from .layouts import JoinedWeights, Layout
from .rounding import CompensatedRounding, Rounding
from .strategies import BitStrategy, DIBits

COSTS = ("size_mb", "bops")


@dataclass(frozen=True)
class EndLayers:
    """Widths of the first and the last layer to run; None leaves them to the search like any other."""

    first: int | None = 8
    last: int | None = 8

    def fixed(self, layers: Sequence[str]) -> Mapping[str, int]:
        """Layer -> its only width."""
        ends = {layers[0]: self.first, layers[-1]: self.last} if layers else {}
        return {layer: width for layer, width in ends.items() if width is not None}


@dataclass(frozen=True)
class Bits:
    """Settings of `quantize`, and of `compress(bits=…)`.

    Attributes:
        budgets: on `size_mb` (the ONNX file) or `bops` (bit operations of one image); a fraction is of the same model
            with 8 bits everywhere. Several hold together.
        strategy: how the budget is spent.
        widths: bits a channel may have, out of 0, 2, 4, 8.
        ends: first and last layer.
        rounding: of weights to their grids.
        finetune: quantization-aware training with the float model as teacher; None takes no gradient step.
        layout: of layers with several widths, in the file.
        images: calibration images.
        rho: relative ridge of Discriminant Information.
        scales: of weights; few significant bits make every sum exact (see `grid`).
        activation_scale_bits: significant bits of activations' scales.
        seed: of samples and of training.
    """

    budgets: tuple[Budget, ...] = (Budget("size_mb", fraction=0.5),)
    strategy: BitStrategy = field(default_factory=DIBits)
    widths: tuple[int, ...] = BIT_WIDTHS
    ends: EndLayers = EndLayers()
    rounding: Rounding = field(default_factory=CompensatedRounding)
    finetune: FineTuning | None = None
    layout: Layout = field(default_factory=JoinedWeights)
    images: int = 500
    rho: float = 10.0
    scales: Scales = field(default_factory=ChannelScales)
    activation_scale_bits: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if budget.cost not in COSTS:
                raise BudgetError(f"expected budgets on {' or '.join(COSTS)} for bits, got one on {budget.cost!r}")
        if not self.budgets:
            raise BudgetError("expected a budget such as size_mb=0.5, got none")
        ends = {width for width in (self.ends.first, self.ends.last) if width is not None}
        if set(self.widths) - set(BIT_WIDTHS) or not set(self.widths) - {0} or ends - set(BIT_WIDTHS) or 0 in ends:
            raise UserError(f"expected widths out of {BIT_WIDTHS} and ends above 0, got {self.widths} and {self.ends}")
        if not self.images >= 2 or not 0 < self.rho < math.inf or not self.activation_scale_bits >= 1:
            raise UserError("expected images of 2 or more, rho above 0 and activation_scale_bits of 1 or more")
