"""Batches of any form as one batch, and a process' part of it."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from diplugin.errors import DataError
from diplugin.recovery.one_batch import one_batch, rows_of


class Sample(NamedTuple):
    """A form of its own."""

    x: Tensor
    names: list[str]


WEIGHTS = torch.rand(7)
NAMES = [f"image {i}" for i in range(10)]


def test_joined_and_dealt() -> None:
    """What has an entry an image goes with the images; what has not is the first batch's and stays whole."""
    x = torch.arange(10.0)
    batches = [
        [Sample(x[i : i + 4], NAMES[i : i + 4]), {"ids": tuple(range(i, min(i + 4, 10))), "epoch": i}, WEIGHTS, None]
        for i in (0, 4, 8)
    ]
    joined, images = one_batch(batches, 9)
    assert images == 9
    for rows in (slice(0, 9), slice(0, 4), slice(4, 9)):
        sample, notes, weights, nothing = rows_of(joined, rows, images)
        assert isinstance(sample, Sample) and torch.equal(sample.x, x[rows])
        assert sample.names == NAMES[rows] and notes == {"ids": tuple(range(9))[rows], "epoch": 0}
        assert torch.equal(weights, WEIGHTS) and nothing is None


@pytest.mark.parametrize(
    "second", [(torch.zeros(4, 3), NAMES[:4]), (NAMES[:4], NAMES[:4]), (torch.zeros(4, 2),), {"x": torch.zeros(4, 2)}]
)
def test_batches_of_several_forms(second: object) -> None:
    with pytest.raises(DataError, match="batches of one shape"):
        one_batch([(torch.zeros(4, 2), NAMES[:4]), second], 8)


def test_nothing_to_join() -> None:
    for loader in ([], [NAMES]):
        with pytest.raises(DataError, match="empty"):
            one_batch(loader, 8)
