"""NNI's evaluators: made with clear complaints, checked, and asked for one batch without training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nni.common import is_traceable
from nni.compression import TorchEvaluator
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from diplugin.errors import UserError
from diplugin.modes import modes_kept
from diplugin.samples import on_cpu


def torch_evaluator(training_func: Any, optimizers: Any, training_step: Any, **kwargs: Any) -> TorchEvaluator:
    """NNI's `TorchEvaluator`, which says what is wrong with an optimizer instead of an empty AssertionError.

    Raises:
        UserError: an optimizer or scheduler that was not made through `nni.trace`.
    """
    schedulers = kwargs.get("lr_schedulers") or []
    for name, given in (("optimizer", optimizers), ("lr_scheduler", schedulers)):
        for one in given if isinstance(given, (list, tuple)) else [given]:
            if not is_traceable(one):
                kind = type(one).__name__
                raise UserError(f"expected {name} made as nni.trace({kind})(...), got a plain {kind}: NNI rebuilds it")
    return TorchEvaluator(training_func, optimizers, training_step, **kwargs)


@contextmanager
def counted_steps(evaluator: Any) -> Iterator[None]:
    """NNI tells a Lightning trainer how many steps to take through `fit_loop.max_steps`, read-only since Lightning 2.

    For the time of the block the loop's class takes the number and passes it on to where Lightning counts now.
    """
    loop: Any = type(getattr(getattr(evaluator, "trainer", None), "fit_loop", None))
    steps = getattr(loop, "max_steps", None)
    if not isinstance(steps, property) or steps.fset is not None:
        yield
        return
    loop.max_steps = steps.setter(lambda loop, count: setattr(loop.epoch_loop, "max_steps", count))
    try:
        yield
    finally:
        loop.max_steps = steps


def check_sources(evaluator: Any, training_steps: Any, calibration_data: Any) -> None:
    """Raise UserError unless there is data to score: calibration data, or an evaluator and how long it trains."""
    if evaluator is None and calibration_data is None:
        raise UserError("expected calibration_data, or an evaluator with training_steps, for DIPruner; got neither")
    if evaluator is not None and not isinstance(evaluator, Evaluator):
        raise UserError(f"expected an NNI evaluator such as TorchEvaluator, got {type(evaluator).__name__}")
    if training_steps is not None or calibration_data is None:
        check_count("training_steps", training_steps)


def check_count(name: str, count: Any) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"expected {name} as an integer of 1 or more, got {count!r}")


def first_batch(model: nn.Module, evaluator: Evaluator) -> Any:
    """The first batch that an evaluator trains on, without training: the loss is tapped and the loop left.

    Buffers, modes and random state are put back.
    """

    class Seen(Exception):
        pass

    batches: list[Any] = []

    def look(loss: Tensor, batch: Any) -> Tensor:
        batches.append(on_cpu(batch))
        raise Seen

    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    evaluator.bind_model(model, {name: name for name, _ in model.named_parameters()})
    try:
        evaluator.patch_loss(look)
        with modes_kept(model), torch.random.fork_rng(), counted_steps(evaluator):
            evaluator.train(max_steps=1)
    except Exception:
        # Whatever else is wrong with the loop will show when it runs in earnest.
        pass
    finally:
        evaluator.unbind_model()
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
    return batches[0] if batches else None
