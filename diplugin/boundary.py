"""Where a user's own code is called: whatever it raises becomes one clear line.

Models, forwards and label readers are other people's; an exception from them is not a defect of diplugin's. Errors of
our own (raised by a hook inside the model, say) pass through unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import DataError, DipluginError, ModelError
from .features import Forward, GetLabels
from .groups import first_line


def guarded_forward(forward: Forward) -> Forward:
    """The same forward; what the model raises on a batch becomes a ModelError that names the batch's shapes."""

    def guarded(model: nn.Module, batch: Any) -> Any:
        try:
            return forward(model, batch)
        except (DipluginError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            shapes = [list(x.shape) for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
            raise ModelError(
                f"expected a model that runs on the data's batches {shapes[:3]}, got {type(error).__name__}: "
                f"{first_line(error)}; check the input shape, or pass forward="
            ) from error

    return guarded


def guarded_labels(get_labels: GetLabels) -> GetLabels:
    """The same reader; what it raises on a batch becomes a DataError."""

    def guarded(batch: Any) -> Tensor:
        try:
            return get_labels(batch)
        except DipluginError:
            raise
        except Exception as error:
            raise DataError(
                f"expected get_labels to read a batch, got {type(error).__name__}: {first_line(error)}"
            ) from error

    return guarded
