"""A bounded sample of a user's data, and what the model is called with: for hosts whose batches take any form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import DataError, DipluginError, first_line
from .features import Observation, device_of, first_images, forward_inputs, to_device
from .modes import evaluating


def collect(loader: Any, images: int) -> list[Any]:
    """The first `images` images of a loader in its batches, on the CPU: the same ones whenever they are read.

    The last batch is cut where all its leaves are of one length, and kept whole elsewhere.

    Raises:
        DataError: not a loader, or one that yields nothing.
    """
    if isinstance(loader, (str, bytes, Mapping, Tensor)) or not isinstance(loader, Iterable):
        raise DataError(f"expected a loader of (inputs, labels) batches, got {type(loader).__name__}")
    batches = [on_cpu(batch) for batch in first_images(loader, images)]
    if not batches:
        raise DataError("expected a loader that yields batches, got an empty one")
    return batches


def on_cpu(batch: Any) -> Any:
    """The batch with detached CPU tensors; any mapping becomes a dict."""
    plain = dict(batch) if isinstance(batch, Mapping) else batch
    return pytree.tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, plain)


def forward_any(model: nn.Module, batch: Any) -> Any:
    """Run the model on (inputs, labels), or on the entries of a dict by name."""
    return model(**batch) if isinstance(batch, Mapping) else forward_inputs(model, batch)


def first_image(inputs: Any) -> Any:
    """The first image of a batch, as a batch of one."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    return tuple(first_image(x) for x in inputs) if isinstance(inputs, (tuple, list)) else inputs


def call_inputs(model: nn.Module, batch: Any, observation: Observation) -> tuple[Any, ...] | None:
    """What the model is called with for the first image of a batch; None unless it is all by position.

    Raises:
        DataError: no labels in the batch, or the model does not run on it.
    """
    observation.get_labels(batch)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            observation.forward(model, to_device(batch, device_of(model)))
    except DipluginError:
        raise
    except Exception as error:
        raise DataError(f"expected batches that the model runs on, got {first_line(error)}; pass forward=") from error
    finally:
        handle.remove()
    return first_image(calls[0][0]) if calls and calls[0][0] and not calls[0][1] else None
