"""Batches of a loader, read and cut.

DI depends on how many images it sees at once, so it is defined over chunks of 250 images in the order of the data,
whatever the loader's batch size; a tail shorter than half a chunk joins the chunk before it. `chunks` re-batches any
loader so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import DataError, DeviceError, UserError, first_line

CHUNK_SIZE = 250

GetLabels = Callable[[Any], Tensor]
Forward = Callable[[nn.Module, Any], Any]


def labels_of(batch: Any) -> Tensor:
    """The labels of an (inputs, labels) batch.

    Raises:
        DataError: the batch is of another form.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    raise DataError(
        f"expected batches of (inputs, labels), got {_form(batch)}; pass get_labels= and forward= for other forms"
    )


def forward_inputs(model: nn.Module, batch: Any) -> Any:
    """Run the model on the inputs of an (inputs, labels) batch; a tuple or dict of inputs is spread."""
    inputs = batch[0]
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _form(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)} ({', '.join(type(x).__name__ for x in batch[:4])})"
    return type(batch).__name__


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on `device`."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)


def move_to(model: nn.Module, device: str) -> nn.Module:
    """The model, moved to the device of this name; its batches follow it.

    Raises:
        DeviceError: torch knows no such device here.
    """
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"expected a device that torch has here, got {device!r}: {first_line(error)}") from error


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def chunks(loader: Iterable[Any], size: int = CHUNK_SIZE) -> Iterator[Any]:
    """Re-batch a loader into chunks of `size` images in order; a tail below size/2 joins the chunk before.

    A batch whose leaves are not all tensors of one length (detection targets, say) cannot be cut: such batches are
    passed on as they come.

    Raises:
        UserError: a size below 1.
        DataError: batches that cannot be joined.
    """
    if size < 1:
        raise UserError(f"expected chunks of 1 image or more, got a chunk size of {size}")
    pending: list[Any] = []
    count = 0
    for batch in loader:
        length = batch_length(batch)
        if length is None:
            yield batch
            continue
        pending.append(batch)
        count += length
        # Half a chunk is held back, so that a short tail can still join the last chunk.
        while count >= size + (size + 1) // 2:
            joined = _join(pending)
            yield pytree.tree_map(lambda x: x[:size], joined)
            pending, count = [pytree.tree_map(lambda x: x[size:], joined)], count - size
    if count:
        yield _join(pending)


def first_images(loader: Iterable[Any], images: int) -> Iterator[Any]:
    """Batches of a loader until `images` images have gone by, none more; the last is cut where its leaves allow."""
    left = images
    for batch in loader if left > 0 else ():
        length = images_in(batch)
        whole = length <= left or any(len(x) != length for x in pytree.tree_leaves(batch) if has_rows(x))
        yield batch if whole else pytree.tree_map(lambda x, left=left: x[:left] if has_rows(x) else x, batch)
        left -= length
        if left <= 0:
            return


def images_in(batch: Any) -> int:
    """Length of a batch's first tensor; 1 where it holds none."""
    return next((len(x) for x in pytree.tree_leaves(batch) if has_rows(x)), 1)


def has_rows(leaf: Any) -> bool:
    """Whether it is a tensor of one entry an image, if the batch is one of images."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def batch_length(batch: Any) -> int | None:
    """How many images a batch holds; None where it cannot be cut, since its leaves are not tensors of one length.

    Raises:
        DataError: inputs and labels of different lengths.
    """
    leaves = pytree.tree_leaves(batch)
    if not leaves or not all(map(has_rows, leaves)):
        return None
    lengths = {len(x) for x in leaves}
    if len(lengths) != 1 and _uneven(batch):
        return None
    if len(lengths) != 1:
        raise DataError(f"expected inputs and labels of one length in a batch, got lengths {sorted(lengths)}")
    return lengths.pop()


def _uneven(batch: Any) -> bool:
    """Whether it holds lists of tensors, one an image, as detection's images and targets."""
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else ()
    return any(isinstance(part, (list, tuple)) for part in parts)


def _join(batches: list[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    try:
        return pytree.tree_map(lambda *xs: torch.cat(xs), *batches)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"expected batches of one shape, got {first_line(error)}") from error
