"""Splits: every image on exactly one side, the same ones with the same seed, whatever the loader is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from diplugin.errors import DataError
from diplugin.holdout import split_holdout


def numbered(images: int, batch_size: int = 7) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(images).float()[:, None], torch.arange(images)), batch_size=batch_size)


def ids(loader: Iterable[Any]) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]


@pytest.mark.parametrize("as_list", [False, True])
def test_the_parts_are_disjoint_and_complete(as_list: bool) -> None:
    loader: Any = list(numbered(50)) if as_list else numbered(50)
    split = split_holdout(loader, 0.2, seed=3)
    training, held = ids(split.training), ids(split.holdout)
    assert sorted(training + held) == list(range(50)) and len(held) == 10 == split.sizes[1]
    assert sorted(ids(split.scoring)) == sorted(training)


def test_scoring_sees_a_sorted_data_set_mixed_and_in_one_order() -> None:
    split = split_holdout(numbered(200), 0.1)
    first = ids(split.scoring)
    assert first == ids(split.scoring) and first != sorted(first)
    assert max(first[:20]) > 100  # the front of the order reaches into the back of the data


def test_training_is_shuffled_anew_and_follows_the_seed() -> None:
    split = split_holdout(numbered(100), 0.1)
    torch.manual_seed(1)
    one, two = ids(split.training), ids(split.training)
    torch.manual_seed(1)
    assert one != two and ids(split.training) == one


def test_the_seed_decides_the_holdout() -> None:
    held = [ids(split_holdout(numbered(60), 0.1, seed=s).holdout) for s in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


@pytest.mark.parametrize("loader", [[], [(torch.zeros(2, 1), torch.zeros(2))], [("a", "b")]])
def test_data_that_cannot_be_split_is_a_clear_error(loader: Any) -> None:
    with pytest.raises(DataError, match="expected"):
        split_holdout(loader)
