"""A holdout of the training data, so that no choice is ever made on test images."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from .boundary import GuardedLoader
from .errors import DataError
from .features import batch_length

_LARGEST = 5000
#: Sooner or later these draw every image alike; how the images are dealt out to processes is the team's affair.
_OF_ALL = (SequentialSampler, RandomSampler, DistributedSampler)


@dataclass(frozen=True)
class Split:
    """Training data in two parts, and a third view of the first.

    Attributes:
        scoring: the training part in one fixed, mixed order, for scores, statistics and moments.
        training: the training part, shuffled anew every epoch.
        holdout: what choices are judged on.
        sizes: images in (training, holdout).
    """

    scoring: Iterable[Any]
    training: Iterable[Any]
    holdout: Iterable[Any]
    sizes: tuple[int, int]


def split_holdout(loader: Iterable[Any], fraction: float = 0.1, seed: int = 0) -> Split:
    """Set a seeded random fraction of the data aside (5,000 images at most).

    A DataLoader over a map-style dataset is split image by image, and its batch size, collation and workers, with how
    they are prepared, are kept; of a `SubsetRandomSampler` only the images that it draws. Anything else is read once
    into memory and split image by image too.

    Raises:
        DataError: a fraction that leaves one part empty, fewer than four images, batches that are not tensors of one
            length, a data set that raises, or a DataLoader whose sampler draws some images more often than others.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset) and loader.batch_size:
        return _split_dataset(loader, fraction, seed)
    batches = list(GuardedLoader(loader))
    if not batches:
        raise DataError("expected a loader that yields batches, got an empty one")
    if any(batch_length(batch) is None for batch in batches):
        raise DataError("expected batches of tensors of one length, or a DataLoader to split, got others")
    try:
        joined = pytree.tree_map(lambda *xs: torch.cat(xs), *batches)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"expected batches of tensors of one shape, or a DataLoader to split: {error}") from error
    images = len(next(x for x in pytree.tree_leaves(joined) if isinstance(x, Tensor)))
    first, second = _parts(images, fraction, seed)
    size = len(next(x for x in pytree.tree_leaves(batches[0]) if isinstance(x, Tensor)))

    def view(ids: Tensor, shuffle: bool = False) -> _Batches:
        return _Batches(pytree.tree_map(lambda x: x[ids], joined), len(ids), size, shuffle)

    return Split(view(first), view(first, shuffle=True), view(second), (len(first), len(second)))


def _split_dataset(loader: DataLoader[Any], fraction: float, seed: int) -> Split:
    dataset: Any = loader.dataset
    drawn = _drawn(loader)
    first, second = (drawn[ids] for ids in _parts(len(drawn), fraction, seed))

    def view(ids: Tensor, shuffle: bool = False) -> Iterable[Any]:
        return GuardedLoader(DataLoader(
            Subset(dataset, ids.tolist()), batch_size=loader.batch_size, shuffle=shuffle,
            collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, num_workers=loader.num_workers,
            worker_init_fn=loader.worker_init_fn, multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor, timeout=loader.timeout,
        ))  # fmt: skip

    return Split(view(first), view(first, shuffle=True), view(second), (len(first), len(second)))


def _drawn(loader: Any) -> Tensor:
    """Images of the data set that are a loader's to read."""
    sampler = loader.sampler
    if isinstance(sampler, SubsetRandomSampler):
        return torch.as_tensor(sampler.indices, dtype=torch.long).unique()
    if not isinstance(sampler, _OF_ALL) or getattr(sampler, "replacement", False):
        raise DataError(f"expected a loader that draws every image once, got one with a {type(sampler).__name__}; "
                        "pass a DataLoader over a torch.utils.data.Subset of the images wanted")  # fmt: skip
    try:
        return torch.arange(len(loader.dataset))
    except TypeError as error:
        raise DataError(f"expected a data set with a length, got {type(loader.dataset).__name__}") from error


def _parts(images: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    if not isinstance(fraction, numbers.Real) or not 0 < fraction < 1:
        raise DataError(f"expected a holdout above 0 and below 1, got {fraction!r:.80}")
    if images < 4:
        raise DataError(f"expected four images or more to set some aside, got {images}")
    held = min(_LARGEST, max(1, round(images * fraction)))
    if held == images:
        raise DataError(f"expected a holdout that leaves images to train on, got {fraction} of {images} images")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return order[held:], order[:held].sort().values


class _Batches:
    """Batches of tensors that are held in memory."""

    def __init__(self, data: Any, images: int, size: int, shuffle: bool) -> None:
        self._data, self._images, self._size, self._shuffle = data, images, size, shuffle

    def __len__(self) -> int:
        return math.ceil(self._images / self._size)

    def __iter__(self) -> Any:
        order = torch.randperm(self._images) if self._shuffle else torch.arange(self._images)
        for ids in order.split(self._size):
            yield pytree.tree_map(lambda x, ids=ids: x[ids], self._data)
