"""What the importance of a group is made of, for whoever asks why these channels go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diplugin.taps import TapPoint

__all__ = ["Explanation"]


@dataclass(frozen=True)
class Explanation:
    """Why the channels of a group rank as they do.

    Attributes:
        group: qualified name of the layer at the group's root.
        note: why the group is left alone; empty if it is scored.
        scores: [channels] what the pruner is given; None if the group is left alone.
        losses: [channels] their DI losses, fractions of label variance, before cost, ranking and floor.
        energies: [channels] how much of its readers' outputs each makes; None where nothing reads.
        norms: [channels] squared norms of the filters that make each, as they are now; None where none do.
        tensors: for every tensor that speaks for the group: where it is, its DI, and its own scores of the channels.
    """

    group: str
    note: str
    scores: Tensor | None
    losses: Tensor | None
    energies: Tensor | None
    norms: Tensor | None
    tensors: tuple[tuple[TapPoint, float, Tensor], ...]

    def __str__(self) -> str:
        if self.scores is None:
            return f"{self.group}: left alone, {self.note}"
        order = torch.argsort(self.scores).tolist()
        lines = [f"{self.group}: {len(order)} channels, first to go {order[:8]}, last {order[-8:]}"]
        for point, di, scores in self.tensors:
            where = "input of" if point.side == "in" else "output of"
            lines.append(f"  {where} {point.layer}: DI {di:.3f}, channels' losses {float(scores.min()):.2e} to "
                         f"{float(scores.max()):.2e}")  # fmt: skip
        return "\n".join(lines)
