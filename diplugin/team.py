"""The processes of one run: `torchrun` or `accelerate launch` starts them, this lets them work and end as one.

Every process holds the same network and iterates the same data. Two kinds of work are shared out. *Alone and then
together*: each process runs its own chunks, and their results are exchanged once at the end; one that fails on the way
comes to the exchange all the same and says why (`together`). *Step by step*: the processes exchange something inside
every forward and backward pass, where one that fails cannot keep the appointment; it leaves its message and closes
the connection, and those who wait for it find the one when they lose the other (`guarding`).

Either way all of them raise the same message. `one_voice` is for commands: the first process to fail prints it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import DataError, DeviceError, ProcessError, first_line

_MESSAGE_BYTES = 512
#: How long the first process waits for the others to read why it stopped.
_PATIENCE = timedelta(seconds=10)
#: Every `guarding` has a name for its message; all processes come through them in the same order.
_GUARDS = itertools.count()


@dataclass(frozen=True)
class Team:
    """The processes that work together: this one's `rank`, and how many there are."""

    rank: int = 0
    size: int = 1

    def mine(self, turn: int) -> bool:
        """Whether this process does the piece of work of this number."""
        return turn % self.size == self.rank

    def rows(self, length: int) -> slice:
        """This process' part of so many rows, as even as they can be dealt.

        >>> Team(0, 2).rows(5), Team(1, 2).rows(5)
        (slice(0, 2, None), slice(2, 5, None))
        """
        return slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes the sum of everybody's, in place; the same bits in all processes."""
        if self.size > 1:
            _exchange(tensors, dist.all_reduce)

    def follow_first(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes that of the first process, in place."""
        if self.size > 1:
            _exchange(tensors, lambda flat: dist.broadcast(flat, 0))

    def told_by_first(self, text: str) -> str:
        """The text that the first process has, in all of them."""
        return text if self.size == 1 else self.sent_by_first(text.encode()).decode()

    def sent_by_first(self, data: bytes) -> bytes:
        """The bytes that the first process has, in all of them."""
        length = torch.tensor([len(data)])
        self.follow_first([length])
        if not int(length):
            return b""
        sent = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.rank == 0 else torch.zeros(int(length)).byte()
        )
        self.follow_first([sent])
        return sent.numpy().tobytes()

    def done_by_first(self, work: Callable[[], Any]) -> Any:
        """What the work gives, as JSON holds it; the first process does it while the others wait."""
        if self.size == 1:
            return work()
        return json.loads(self.told_by_first(json.dumps(work()) if self.rank == 0 else ""))

    def everybodys(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, all of one shape, where this one's lives."""
        if self.size == 1:
            return [tensor]
        sent = _where_it_travels(tensor.contiguous())
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        with _connected():
            dist.all_gather(parts, sent)
        return [part.to(tensor.device) for part in parts]

    def agree(self, failure: Exception | None = None) -> None:
        """Called by all processes at the end of what each did alone.

        Raises:
            DipluginError: the failure of this process, or the message of one that failed.
        """
        told = _messages(self, failure) if self.size > 1 else []
        if failure is not None:
            raise failure
        for rank, message in enumerate(told):
            if message:
                raise ProcessError(f"process {rank} of {self.size} stopped: {message}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that each process does alone: at the end of the block all go on, or all stop with one message."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(failure)

    @contextmanager
    def guarding(self) -> Iterator[None]:
        """Work in which the processes wait for each other: what stops one stops all, with its message."""
        if self.size == 1:
            yield
            return
        name = f"diplugin/stopped/{next(_GUARDS)}"
        try:
            yield
        except ProcessError:
            raise  # that message is known
        except BaseException as error:
            said = _leave_message(name, f"{self.rank} {_reason(error)}")
            rank, _, message = said.partition(" ")
            if int(rank) == self.rank or not isinstance(error, Exception):
                raise
            raise ProcessError(f"process {rank} of {self.size} stopped: {message}") from error


@contextmanager
def process_group() -> Iterator[Team]:
    """Join the processes that `torchrun` or `accelerate launch` started, for the time of the block; nothing without.

    NCCL connects them where every process has a GPU of its own, gloo elsewhere.

    Raises:
        DeviceError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or dist.is_initialized():
        yield current_team(())
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # Its functions have the group of the moment of their import as a default, and torch imports them late, with the
    # compiler: then `destroy_process_group` would close nothing, and who waits for this process would go on waiting.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        if gpus:
            torch.cuda.set_device(local % gpus)
        dist.init_process_group("nccl" if gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else "gloo")
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"expected {size} processes that reach each other, got {first_line(error)}") from error
    rank, store = dist.get_rank(), _store()
    try:
        yield Team(rank, size)
    except BaseException:
        dist.destroy_process_group()  # wakes those who wait for this process
        _await_readers(store, rank, size)
        raise
    dist.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[Team]:
    """`process_group` for a command: of the processes that stop, the first says why and the others end in silence.

    Raises:
        SystemExit: in the silent ones, with the exit code of what stopped them.
    """
    with process_group() as team:
        try:
            with team.guarding(), warnings.catch_warnings():
                if team.rank:
                    warnings.simplefilter("ignore")
                yield team
        except (Exception, KeyboardInterrupt) as error:
            if not _speaks(team):
                code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
                raise SystemExit(code) from None
            raise


def samplers_of(loader: Any) -> tuple[Any, ...]:
    """What a loader draws its images and batches by, one behind the other; None for those that it does not have."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)


def current_team(loader: Iterable[Any] = ()) -> Team:
    """The processes of this run; one, unless `torch.distributed` was initialised.

    Raises:
        DataError: a loader that already shows every process its own share of the data.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Team()
    for sampler in samplers_of(loader):
        # torch's name for how many share the data, and accelerate's.
        if max(getattr(sampler, "num_replicas", 1), getattr(sampler, "num_processes", 1)) > 1:
            raise DataError(f"expected the same loader in every process, got one with a {type(sampler).__name__} of "
                            "this one's share: batches are shared out by diplugin itself")  # fmt: skip
    return Team(dist.get_rank(), dist.get_world_size())


def _messages(team: Team, failure: Exception | None) -> list[str]:
    """What stopped each process, empty where nothing did."""
    text = "" if failure is None else _reason(failure)
    encoded = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    messages = team.everybodys(torch.frombuffer(bytearray(encoded), dtype=torch.uint8).clone())
    return [bytes(message.tolist()).rstrip(b"\0").decode(errors="ignore") for message in messages]


def _reason(error: BaseException) -> str:
    return "interrupted" if isinstance(error, KeyboardInterrupt) else first_line(error)


def _leave_message(name: str, message: str) -> str:
    """The message under this name: the first that any process left."""
    try:
        return _store().compare_set(name, "", message).decode()
    except (RuntimeError, ValueError):  # the process that kept the messages is gone
        return message


def _store() -> dist.Store:
    """Where the processes found each other, and can leave messages."""
    return dist.distributed_c10d._get_default_store()


def _await_readers(store: dist.Store, rank: int, size: int) -> None:
    """Without `torchrun` the first process keeps the messages: it ends once the others have read them."""
    try:
        if rank:
            store.set(f"diplugin/left/{rank}", "")
        else:
            store.wait([f"diplugin/left/{other}" for other in range(1, size)], _PATIENCE)
    except (RuntimeError, ValueError):
        return


def _speaks(team: Team) -> bool:
    """Whether this process is the first that asks."""
    if team.size == 1:
        return True
    try:
        return _store().add("diplugin/spoke", 1) == 1
    except (RuntimeError, ValueError):
        return True


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the connection is gone: a process was killed
        raise DeviceError(
            f"another process of this run ended ({first_line(error)}): start all of them again"
        ) from error


def _where_it_travels(tensor: Tensor) -> Tensor:
    """NCCL carries what lies on this process' GPU, gloo what lies in memory."""
    if dist.get_backend() == "nccl":
        return tensor if tensor.is_cuda else tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor.cpu()


def _exchange(tensors: Sequence[Tensor], carry: Callable[[Tensor], Any]) -> None:
    """Every tensor becomes what a collective makes of it, in place; those of one type travel as one."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == dtype]
        flat = _where_it_travels(torch.cat([t.detach().reshape(-1) for t in same]))
        with _connected():
            carry(flat)
        with torch.no_grad():
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))
