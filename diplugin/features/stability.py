"""How sure the ranking is: two halves of the data rank the channels, and their agreement tells what all of it knows.

The chunks seen so far are dealt into two halves; r is the rank correlation of the halves' scores inside a layer,
averaged over layers by their channels. The whole is twice as long as either half, so by Spearman and Brown its ranking
correlates with that of as many fresh images by 2r/(1 + r): its *reliability*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..discriminant import ChunkScores
from ..errors import UserError
from ..rank_correlation import rank_correlation
from ..taps import TapPoint

Chunk = Mapping[TapPoint, ChunkScores]


@dataclass(frozen=True)
class UntilStable:
    """Stop scoring once the ranking is reliable.

    Attributes:
        target: reliability to reach, below 1.
        least_chunks: how many chunks are seen before the rule is asked; an agreement of two is too often chance.
    """

    target: float = 0.98
    least_chunks: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise UserError(f"expected a reliability between 0 and 1 to stop at, got {self.target}")

    def reached(self, chunks: Sequence[Chunk]) -> bool:
        """Whether these chunks suffice."""
        return len(chunks) >= max(2, self.least_chunks) and reliability(chunks) >= self.target


def reliability(chunks: Sequence[Chunk]) -> float:
    """Expected rank correlation, inside layers, of these chunks' scores with those of as many fresh images.

    Returns:
        at most 1; 0 with fewer than two chunks.
    """
    halves = chunks[0::2], chunks[1::2]
    if not halves[1]:
        return 0.0
    total, channels = 0.0, 0
    for point in chunks[0]:
        first, second = (_average(half, point) for half in halves)
        if first is None or second is None or len(first) < 2:
            continue
        total += len(first) * rank_correlation(first, second)
        channels += len(first)
    agreement = max(0.0, total / channels) if channels else 1.0
    return 2 * agreement / (1 + agreement)


def _average(chunks: Sequence[Chunk], point: TapPoint) -> Tensor | None:
    found = [chunk[point].scores for chunk in chunks if point in chunk]
    return torch.stack(found).mean(0) if found else None
