"""All images that a fit sees, as one batch, and the part of it that one process works on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import DataError, first_line
from ..features import first_images, has_rows, images_in


def one_batch(loader: Iterable[Any], images: int) -> tuple[Any, int]:
    """The first images of a loader in one batch of the loader's form, and how many they are.

    What holds an entry an image is joined: tensors [N, ...], and lists or tuples of N names, say. Anything else is
    the first batch's.

    Raises:
        DataError: the loader yields nothing, or batches that cannot be joined.
    """
    batches = list(first_images(loader, images))
    lengths = [images_in(batch) for batch in batches]
    if not sum(lengths) or not any(map(has_rows, pytree.tree_leaves(batches))):
        raise DataError("expected a loader that yields batches to reconstruct with, got an empty one")
    try:
        joined = pytree.tree_map(lambda *parts: _joined(parts, lengths), *batches, is_leaf=_is_leaf)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"expected batches of one shape to reconstruct with, got {first_line(error)}") from error
    found = sum(lengths)  # more than wanted where the last batch could not be cut by itself
    return rows_of(joined, slice(images), found), min(images, found)


def rows_of(batch: Any, rows: slice, images: int) -> Any:
    """These rows of a batch of so many images; what does not hold an entry an image stays whole."""

    def cut(leaf: Any) -> Any:
        return leaf[rows] if _has_entries(leaf) and len(leaf) == images else leaf

    return pytree.tree_map(cut, batch, is_leaf=_is_leaf)


def _joined(parts: tuple[Any, ...], lengths: list[int]) -> Any:
    """What one place of the batches holds, for all their images; `lengths` says how many images each has."""
    first = parts[0]
    if not _has_entries(first):
        return first
    if not all(_has_entries(part) and isinstance(part, Tensor) == isinstance(first, Tensor) for part in parts):
        raise ValueError(f"a {type(first).__name__} in one batch and something else in its place in another")
    if isinstance(first, Tensor):
        return torch.cat(parts) if [len(part) for part in parts] == lengths else first
    if any(len(part) < length for part, length in zip(parts, lengths, strict=True)):
        return first
    # The last batch's tensors are cut to the images that are wanted, its lists are not yet.
    entries = [entry for part, length in zip(parts, lengths, strict=True) for entry in part[:length]]
    return tuple(entries) if isinstance(first, tuple) else entries


def _is_leaf(node: Any) -> bool:
    """A list without a tensor is asked as a whole whether it holds an entry an image."""
    return isinstance(node, (list, tuple)) and not any(isinstance(x, Tensor) for x in pytree.tree_leaves(node))


def _has_entries(leaf: Any) -> bool:
    return has_rows(leaf) or isinstance(leaf, (list, tuple))
