"""Fine-tuning of a pruned network, with or without the unpruned one as teacher.

`train` is the one loop for all `settings`. It is deterministic: every epoch seeds its own shuffling, and the state
after each epoch (weights, momenta, schedule) can be saved and loaded, so a run that was killed goes on as if it had not
been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import DataError, ModelError, PlanError, UserError, first_line
from ..features import Forward, GetLabels, device_of, forward_inputs, labels_of, to_device
from ..modes import modes_kept
from ..team import Team, current_team, samplers_of
from ..whole_files import write_bytes
from .losses import output_kind
from .settings import FineTuning
from .shared_step import SharedStep


@dataclass(frozen=True)
class EpochReport:
    """What `train` tells after each epoch."""

    epoch: int
    epochs: int
    loss: float


def train(
    model: nn.Module,
    loader: Iterable[Any],
    settings: FineTuning,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    get_labels: GetLabels = labels_of,
    forward: Forward = forward_inputs,
    checkpoint: Path | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    extra: Callable[[], Tensor] | None = None,
) -> nn.Module:
    """Train the model in place and return it, in the mode it came in.

    Where `torch.distributed` is initialised every batch is shared out (`shared_step`): all processes are given the
    same model, loader and settings, and end with the network that one process would have trained, up to rounding.

    Args:
        loader: batches of training data, iterated once an epoch; it must have a length.
        teacher: the unpruned network, never changed; needed where `settings.teacher_weight` is not 0.
        seed: with the epoch, seeds torch's generator before every epoch, and the loader's own where it has one. What a
            data set draws from others (NumPy's, Python's) without workers is its own affair.
        checkpoint: safetensors file written after every epoch, and taken up from where it exists; of many processes
            only the first one writes and reads it.
        extra: one more term of the loss, asked once both networks have run on a batch.

    Raises:
        DataError: no batches that can be trained on, or a loss or a network that is no longer finite.
        ModelError: no parameter to train.
        PlanError: a checkpoint that is broken, or of another network or a longer training, or cannot be written.
        UserError: no teacher where one is needed.
    """
    check_trainable(model)
    if settings.teacher_weight and teacher is None:
        raise UserError(f"expected a teacher for {type(settings).__name__}, got none")
    steps = _length(loader)
    optimizer = torch.optim.SGD(_groups(model, settings.weight_decay), lr=settings.lr, momentum=settings.momentum,
                                nesterov=settings.momentum > 0)  # fmt: skip
    total = settings.epochs * steps
    guide = teacher if settings.teacher_weight else None
    team = current_team(loader)
    shared = SharedStep(team)
    with team.guarding(), modes_kept(model), modes_kept(guide) if guide is not None else nullcontext():
        start = _take_up(checkpoint, model, optimizer, settings.epochs, team)
        for epoch in range(start, settings.epochs):
            _reseed(loader, seed * 100_003 + epoch)
            model.train()
            losses = []
            for step, batch in enumerate(loader, epoch * steps):
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * _lr_factor(step, total, settings.warm_up)
                losses.append(_step(model, batch, step, optimizer, settings, guide, get_labels, forward, extra,
                                    shared))  # fmt: skip
            loss = _mean(losses)
            if not (math.isfinite(loss) and _is_finite(model)):  # BatchNorm hides an overflow from the loss
                raise DataError(f"training diverged in epoch {epoch + 1} (loss {loss}); lower the learning rate")
            if team.rank == 0:
                _save_state(checkpoint, model, optimizer, epoch + 1)
            if on_epoch:
                on_epoch(EpochReport(epoch + 1, settings.epochs, loss))
    return model


def check_trainable(model: nn.Module) -> None:
    """Raise ModelError where every parameter is frozen."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("expected a model with parameters to train, got one that has none or whose are all frozen "
                         "(requires_grad=False)")  # fmt: skip


def _reseed(loader: Any, seed: int) -> None:
    """Seed torch's generator, and those that a loader and its samplers bring along: their state is not saved."""
    torch.manual_seed(seed)
    for drawing in (loader, *samplers_of(loader)):
        generator = getattr(drawing, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)


def _mean(losses: Sequence[float | None]) -> float:
    """Over the steps that were taken; all processes see the same batches, and skip or stop at the same ones."""
    taken = [loss for loss in losses if loss is not None]
    if not taken:
        raise DataError("expected batches of two images or more to train BatchNorm with, got none; "
                        "raise the loader's batch size")  # fmt: skip
    return sum(taken) / len(taken)


def _is_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in model.state_dict().values() if t.is_floating_point())


def _length(loader: Iterable[Any]) -> int:
    try:
        steps = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise DataError("expected a training loader with a length, such as a DataLoader") from None
    if steps == 0:
        raise DataError("expected a training loader that yields batches, got an empty one")
    return steps


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """No decay on biases and normalisation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _lr_factor(step: int, total: int, warm_up: float) -> float:
    first = max(1, int(warm_up * total))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, total - first)))


def _step(
    model: nn.Module, batch: Any, step: int, optimizer: torch.optim.Optimizer, settings: FineTuning,
    teacher: nn.Module | None, get_labels: GetLabels, forward: Forward, extra: Callable[[], Tensor] | None,
    shared: SharedStep,
) -> float | None:  # fmt: skip
    """The loss on a batch, before the step; None where no step was taken."""
    part = shared.part(batch)
    batch = to_device(part.batch, device_of(model))
    labels = get_labels(batch)
    if len(labels) == 0 or (len(labels) == 1 and _trains_batchnorm(model)):
        return None  # one image has no statistics of a batch
    with shared.running(part, step):
        logits = forward(model, batch)
        kind = output_kind(logits, labels, partial(shared.everywhere, part))
        weight = settings.teacher_weight if teacher is not None else 0.0
        loss = (1 - weight) * kind.label_loss(logits, labels, settings.smoothing)
        if teacher is not None:
            loss = loss + weight * kind.teacher_loss(logits, _ask(teacher, batch, forward), settings.temperature)
        if extra is not None:
            loss = loss + extra()
        loss = part.share * loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
    whole = shared.summed(part, loss, [p for group in optimizer.param_groups for p in group["params"]])
    optimizer.step()
    return whole


def _trains_batchnorm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())


def _ask(teacher: nn.Module, batch: Any, forward: Forward) -> Tensor:
    teacher.eval()
    with torch.no_grad():
        return forward(teacher, batch)


def _take_up(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, team: Team) -> int:
    """The epoch to go on with; all processes go on from the first one's state."""
    start = torch.tensor([_load_state(path, model, optimizer, epochs) if team.rank == 0 else 0])
    team.follow_first([start])
    team.follow_first([v for v in model.state_dict().values() if isinstance(v, Tensor)])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moving = torch.tensor(["momentum_buffer" in optimizer.state.get(p, {}) for p in parameters], dtype=torch.uint8)
    team.follow_first([moving])
    momenta = []
    for parameter, moves in zip(parameters, moving.tolist(), strict=True):
        if moves:
            state = optimizer.state[parameter]
            momenta.append(state.setdefault("momentum_buffer", torch.zeros_like(parameter)))
    team.follow_first(momenta)
    return int(start)


def _save_state(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> None:
    if path is None:
        return
    state = {f"model.{k}": v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            state[f"momentum.{i}"] = momentum.detach().cpu().contiguous().clone()
    try:
        write_bytes(path, save(state, metadata={"epoch": str(epoch)}))
    except OSError as error:
        raise PlanError(f"expected a checkpoint that can be written at {path}, got {first_line(error)}") from error


def _load_state(path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, epochs: int) -> int:
    """The epoch to go on with.

    Raises:
        PlanError: the file is broken, or of another network or a longer training.
    """
    if path is None or not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            epoch = int((file.metadata() or {})["epoch"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file is no mapping
        if not 0 <= epoch <= epochs:
            raise ValueError(f"epoch {epoch} of {epochs}")
        _put_back(state, model, optimizer)
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
        raise PlanError(f"expected the state of this training in {path}, got {type(error).__name__}: "
                        f"{first_line(error)}; remove it to train anew") from error  # fmt: skip
    return epoch


def _put_back(state: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What `_save_state` wrote; ValueError or RuntimeError where it is not this network's, or not finite."""
    odd = next((k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())), None)
    if odd is not None:
        raise ValueError(f"{odd} with numbers that are not finite")
    parameters = {
        f"momentum.{i}": p for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    for name, momentum in state.items():
        if name.startswith("model."):
            continue
        if name not in parameters or momentum.shape != parameters[name].shape:
            raise ValueError(f"{name} of shape {tuple(momentum.shape)}, which is no parameter's")
        optimizer.state[parameters[name]]["momentum_buffer"] = momentum.to(parameters[name])
