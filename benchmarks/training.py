"""Fine-tuning as every contender gets it: SGD with momentum, flips and shifts, the last epoch's weights.

Whatever chance and schedule decide is drawn before the first step (`Course`), so that a step is a function of its
number alone. On a GPU that step is captured once as a CUDA graph and replayed: networks this small leave a GPU waiting
for Python, and several of them find room on one beside each other (`train_together`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diplugin.recovery.losses import teacher_loss
from diplugin.sources import draw_moves, flipped_and_shifted
from diplugin.surgery import load_weights, read_weights, save_weights
from diplugin.whole_files import writing_whole

#: Steps before a capture: libraries choose their kernels and allocate in them.
WARM_UP = 3


@dataclass(frozen=True)
class Recipe:
    """One way to fine-tune.

    Attributes:
        milestones: epochs after which the learning rate falls tenfold; empty for a cosine to zero.
        teacher_weight: share of the unpruned network's say in the loss, as in `diplugin.recovery.Distillation`.
        compiled: train through `torch.compile`, half as fast again on a CPU; needs a C++ compiler.
        bf16: forward passes in bfloat16, as `torch.autocast` does it.
        shift: pixels by which an image may move, as far as it is padded.
    """

    epochs: int = 10
    images: int = 20_000
    lr: float = 0.02
    batch: int = 128
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = ()
    teacher_weight: float = 0.0
    compiled: bool = False
    bf16: bool = False
    shift: int = 4

    def rate(self, step: int, steps: int) -> float:
        if self.milestones:
            epoch = step * self.epochs // steps
            return self.lr * 0.1 ** sum(epoch >= m for m in self.milestones)
        return self.lr * 0.5 * (1 + float(np.cos(np.pi * step / steps)))

    def course(self, images: int, seed: int) -> Course:
        torch.manual_seed(seed)
        ids, moves = [], []
        for _ in range(self.epochs):
            order = torch.randperm(images)
            for batch in order[: images // self.batch * self.batch].view(-1, self.batch):
                ids.append(batch)
                moves.append(draw_moves(self.batch, self.shift))
        rates = [self.rate(step, len(ids)) for step in range(len(ids))]
        return Course(torch.stack(ids), torch.stack(moves), torch.tensor(rates, dtype=torch.float64))

    def train(self, model: nn.Module, x: Tensor, y: Tensor, seed: int, teacher: nn.Module | None = None) -> nn.Module:
        """Train in place on images that lie where the model does; returns it in eval mode."""
        train_together([Training(self, model, x, y, seed, teacher)])
        return model


@dataclass(frozen=True)
class Course:
    """What chance and schedule say of every step.

    Attributes:
        ids: images of its batch, int64 [steps, batch].
        moves: of `draw_moves`, int64 [steps, 3, batch].
        rates: of learning, float64 [steps].
    """

    ids: Tensor
    moves: Tensor
    rates: Tensor

    def to(self, device: torch.device) -> Course:
        return Course(self.ids.to(device), self.moves.to(device), self.rates.to(device))


class Training:
    """One network on its way through a recipe, a step at a time."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor, seed: int, teacher: nn.Module | None = None
    ) -> None:
        torch.compiler.reset()  # the compiler gives up on code that it has seen with many shapes
        self.model = model.to(memory_format=torch.channels_last).train()
        self._recipe, self._x, self._y = recipe, x, y
        self._forward, self._loss = self._ready(self.model), self._taught(teacher)
        self._course = recipe.course(len(x), seed).to(x.device)
        rate = torch.tensor(recipe.lr, device=x.device) if x.is_cuda else recipe.lr  # a graph reads it from memory
        self._optimizer = torch.optim.SGD(self.model.parameters(), rate, momentum=0.9,
                                          weight_decay=recipe.weight_decay, fused=x.is_cuda)  # fmt: skip
        self._at = torch.zeros(1, dtype=torch.int64, device=x.device)
        self.done = 0
        self._take_step = self._captured() if x.is_cuda else self._step

    @property
    def steps(self) -> int:
        return len(self._course.rates)

    def step(self) -> None:
        self._take_step()
        self.done += 1

    def state(self) -> dict[str, Tensor]:
        """All that later steps depend on, on the CPU."""
        _wait()
        moving = {f"momentum.{i}": buffer for i, buffer in enumerate(self._momentum())}
        own = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return {
            name: value.detach().cpu().contiguous().clone() for name, value in {**own, **moving, "at": self._at}.items()
        }

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Go on where a `state` was; a captured step goes on in the same memory."""
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        for i, buffer in enumerate(self._momentum()):
            buffer.copy_(state[f"momentum.{i}"])
        self._at.copy_(state["at"])
        self.done = int(state["at"])

    def _momentum(self) -> list[Tensor]:
        """Of every parameter; zeros before the first step, which are what a first step assumes."""
        found = []
        for parameter in self.model.parameters():
            held = self._optimizer.state[parameter]
            if held.get("momentum_buffer") is None:
                held["momentum_buffer"] = torch.zeros_like(parameter)
            found.append(held["momentum_buffer"])
        return found

    def _step(self) -> None:
        """The step that `self._at` counts; nothing in it waits for a GPU, or is decided by Python there."""
        ids, moves, rate = (table.index_select(0, self._at)[0]
                            for table in (self._course.ids, self._course.moves, self._course.rates))  # fmt: skip
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate.item()
        images = flipped_and_shifted(self._x.index_select(0, ids), moves, self._recipe.shift)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._recipe.bf16, cache_enabled=False):
            loss = self._loss(self._forward(images), images, self._y.index_select(0, ids))
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._at += 1

    def _captured(self) -> Callable[[], None]:
        """The step as a CUDA graph on a stream of its own; the network is left as it was."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        before = copy.deepcopy(self.model.state_dict())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._at.zero_()
                self._step()
        with torch.cuda.graph(graph, stream=stream):  # records, and does nothing yet
            self._step()
        self.model.load_state_dict(before)
        self._at.zero_()
        for buffer in self._momentum():
            buffer.zero_()
        torch.cuda.synchronize()

        def step() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return step

    def _ready(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        return torch.compile(model) if self._recipe.compiled else model

    def _taught(self, teacher: nn.Module | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The loss of (logits, images, labels), the teacher's part included where it has one."""
        weight = self._recipe.teacher_weight
        if not weight:
            return lambda logits, _, labels: F.cross_entropy(logits, labels)
        if teacher is None:
            raise ValueError("a teacher's weight asks for a teacher")
        says = self._ready(copy.deepcopy(teacher).to(self._x.device, memory_format=torch.channels_last).eval())

        def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                told = says(images)
            return (1 - weight) * F.cross_entropy(logits, labels) + weight * teacher_loss(logits, told)

        return loss


def train_together(trainings: Sequence[Training], kept: Sequence[Path] | None = None, every: int = 2_000) -> None:
    """All to their ends, a step of each in turn; the networks are in eval mode then.

    Args:
        kept: one file for each, where it is written every so many steps, taken up from, and deleted at its end.
    """
    files = dict(zip(trainings, kept or (), strict=False))
    for training, path in files.items():
        if path.exists():
            training.take_up(load_file(path))
    while unfinished := [t for t in trainings if t.done < t.steps]:
        for training in unfinished:
            training.step()
            if training in files and training.done % every == 0 and training.done < training.steps:
                with writing_whole(files[training]) as partial:
                    save_file(training.state(), partial)
    _wait()
    for training in trainings:
        training.model.eval()
    for path in files.values():
        path.unlink(missing_ok=True)


def from_scratch(
    make: Callable[[], nn.Module], recipe: Recipe, x: Tensor, y: Tensor, seed: int, kept: Path | None = None
) -> nn.Module:
    """A network in eval mode with the weights that are kept in a file, else trained, and kept there."""
    torch.manual_seed(seed)
    model = make()
    if kept is not None and kept.exists():
        load_weights(model, read_weights(kept), str(kept))
        return model.eval()
    recipe.train(model, x, y, seed)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, kept)
    return model


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
