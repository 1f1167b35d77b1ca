"""Many processes, one set of scores: chunks are dealt out, their scores come together.

Under `torchrun` every process iterates the *same* loader and runs the model on every size-th chunk. What is exchanged
are the scores of each chunk, which every process then averages in the order of the data: the result is that of one
process over the same chunks, whatever the number of processes, the loader's batch size or an uneven tail. A process
that fails tells the others, and all of them raise one message.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from ..discriminant import ChunkScores
from ..errors import DataError, DeviceError
from ..groups import first_line
from ..taps import TapPoint

Chunk = dict[TapPoint, ChunkScores]
_MESSAGE_BYTES = 512
_HEAD = 3  # di, ridge, images before the scores; images 0: this layer did not run on that chunk


@dataclass(frozen=True)
class Team:
    """The processes that score together: this one's `rank`, and how many there are."""

    rank: int = 0
    size: int = 1

    def mine(self, chunk: int) -> bool:
        """Whether this process runs the chunk of this number."""
        return chunk % self.size == self.rank

    def gather(self, own: Sequence[Chunk], points: Sequence[TapPoint], failure: Exception | None = None) -> list[Chunk]:
        """Everybody's chunks in the order of the data; called by all processes the same number of times.

        Raises:
            DipluginError: the failure of this process, or the message of one that failed.
        """
        if self.size == 1:
            if failure is not None:
                raise failure
            return list(own)
        try:
            told = self._told(failure)
            dealt = self._exchange(own, points) if not any(told) else []
        except RuntimeError as error:  # the connection is gone: a process was killed
            raise DeviceError(
                f"another process of this run ended ({first_line(error)}): start all of them again"
            ) from error
        if failure is not None:
            raise failure
        for rank, message in enumerate(told):
            if message:
                raise DataError(f"process {rank} of {self.size} stopped: {message}")
        most = max(len(part) for part in dealt)
        return [part[turn] for turn in range(most) for part in dealt if turn < len(part)]

    def _told(self, failure: Exception | None) -> list[str]:
        """What stopped each process, empty where nothing did."""
        text = "" if failure is None else first_line(failure)
        encoded = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
        messages = _all_gather(torch.frombuffer(bytearray(encoded), dtype=torch.uint8).clone(), self.size)
        return [bytes(message.tolist()).rstrip(b"\0").decode(errors="ignore") for message in messages]

    def _exchange(self, own: Sequence[Chunk], points: Sequence[TapPoint]) -> list[list[Chunk]]:
        """The chunks of every process."""
        widths = self._widths(own, points)
        rows = pack(own, points, widths)
        counts = [int(count) for count in _all_gather(torch.tensor([len(own)]), self.size)]
        padded = torch.zeros(max(counts), rows.shape[1], dtype=torch.float64)
        padded[: len(own)] = rows
        parts = _all_gather(padded, self.size)
        return [unpack(part[:count], points, widths) for part, count in zip(parts, counts, strict=True)]

    def _widths(self, own: Sequence[Chunk], points: Sequence[TapPoint]) -> list[int]:
        known = [max((len(chunk[p].scores) for chunk in own if p in chunk), default=0) for p in points]
        return torch.stack(_all_gather(torch.tensor(known), self.size)).amax(0).tolist() if points else []


@contextmanager
def process_group() -> Iterator[Team]:
    """Join the processes that `torchrun` started, for the time of the block; nothing without it.

    Raises:
        DeviceError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or dist.is_initialized():
        yield current_team(())
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"expected {size} processes that reach each other, got {first_line(error)}") from error
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def current_team(loader: Iterable[Any]) -> Team:
    """The processes of this run; one, unless `torch.distributed` was initialised.

    Raises:
        DataError: a loader that already shows every process its own share of the data.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Team()
    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
        raise DataError("expected the same loader in every process, got one with a DistributedSampler: chunks are "
                        "shared out by diplugin itself")  # fmt: skip
    return Team(dist.get_rank(), dist.get_world_size())


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


def _all_gather(tensor: Tensor, size: int) -> list[Tensor]:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = tensor.to(device)
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor)
    return [part.cpu() for part in parts]
