"""Where a user's own code is called: whatever it raises becomes one clear line.

Models, forwards, label readers and data sets are other people's; an exception from them is not a defect of diplugin's.
Errors of our own (raised by a hook inside the model, say) pass through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import DataError, DipluginError, ModelError, first_line
from .features import Forward, GetLabels


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


class GuardedLoader:
    """The same batches, if need be varied on the way out; what reading or varying them raises becomes a DataError.

    Args:
        loader: batches; its length and its samplers, where it has them, are this one's.
        augment: varies the images [N, ...] of a batch (images, ...).
    """

    def __init__(self, loader: Iterable[Any], augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self._loader, self._augment = loader, augment
        self.sampler = getattr(loader, "sampler", None)
        self.batch_sampler = getattr(loader, "batch_sampler", None)

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        batches = None
        while True:
            # Only what happens in here is the data's fault: whoever reads the batch answers for itself.
            try:
                batches = iter(self._loader) if batches is None else batches
                batch = self._varied(next(batches))
            except StopIteration:
                return
            except (DipluginError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise DataError(
                    f"expected data that can be read, got {type(error).__name__}: {_cause(error)}; mend the data set"
                ) from error
            yield batch

    def _varied(self, batch: Any) -> Any:
        if self._augment is None:
            return batch
        if not isinstance(batch, (tuple, list)):
            raise DataError(f"expected batches of (images, ...) to augment, got a {type(batch).__name__}; vary them in "
                            "the data set")  # fmt: skip
        images, *rest = batch
        varied = [self._augment(images), *rest]
        return type(batch)(*varied) if hasattr(batch, "_fields") else varied  # a named tuple keeps its names


def _cause(error: Exception) -> str:
    """The message; of an exception that a DataLoader's worker process sent home, the last line of its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "Original Traceback" in str(error) else first_line(error)
