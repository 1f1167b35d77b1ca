"""Many processes, one set of scores: chunks are dealt out, their scores come together.

Every process iterates the *same* loader and runs the model on every size-th chunk. What is exchanged are the scores of
each chunk, which every process then averages in the order of the data: the result is that of one process over the same
chunks, whatever the number of processes, the loader's batch size or an uneven tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..discriminant import ChunkScores
from ..taps import TapPoint
from ..team import Team

Chunk = dict[TapPoint, ChunkScores]
_HEAD = 3  # di, ridge, images before the scores; images 0: this layer did not run on that chunk


def exchange(
    team: Team, own: Sequence[Chunk], points: Sequence[TapPoint], failure: Exception | None = None
) -> list[Chunk]:
    """Everybody's chunks in the order of the data; called by all processes the same number of times.

    Args:
        own: scores of the chunks that this process ran.
        failure: what kept it from running more.

    Raises:
        DipluginError: the failure of this process, or the message of one that failed.
    """
    team.agree(failure)
    if team.size == 1:
        return list(own)
    widths = _widths(team, own, points)
    rows = pack(own, points, widths)
    counts = [int(count) for count in team.everybodys(torch.tensor([len(own)]))]
    padded = torch.zeros(max(counts), rows.shape[1], dtype=torch.float64)
    padded[: len(own)] = rows
    parts = team.everybodys(padded)
    dealt = [unpack(part[:count], points, widths) for part, count in zip(parts, counts, strict=True)]
    return [part[turn] for turn in range(max(counts)) for part in dealt if turn < len(part)]


def _widths(team: Team, own: Sequence[Chunk], points: Sequence[TapPoint]) -> list[int]:
    known = [max((len(chunk[p].scores) for chunk in own if p in chunk), default=0) for p in points]
    return torch.stack(team.everybodys(torch.tensor(known))).amax(0).tolist() if points else []


def pack(chunks: Sequence[Chunk], points: Sequence[TapPoint], widths: Sequence[int]) -> Tensor:
    """One float64 row a chunk: di, ridge, images and scores of every point."""
    rows = torch.zeros(len(chunks), sum(widths) + _HEAD * len(points), dtype=torch.float64)
    for row, chunk in zip(rows, chunks, strict=True):
        start = 0
        for point, width in zip(points, widths, strict=True):
            scored = chunk.get(point)
            if scored is not None:
                row[start : start + _HEAD] = torch.tensor([scored.di, scored.ridge, scored.images], dtype=torch.float64)
                row[start + _HEAD : start + _HEAD + width] = scored.scores.cpu()
            start += _HEAD + width
    return rows


def unpack(rows: Tensor, points: Sequence[TapPoint], widths: Sequence[int]) -> list[Chunk]:
    """The inverse of `pack`."""
    chunks: list[Chunk] = []
    for row in rows:
        chunk: Chunk = {}
        start = 0
        for point, width in zip(points, widths, strict=True):
            di, ridge, images = row[start : start + _HEAD].tolist()
            if images:
                chunk[point] = ChunkScores(row[start + _HEAD : start + _HEAD + width].clone(), di, ridge, int(images))
            start += _HEAD + width
        chunks.append(chunk)
    return chunks
