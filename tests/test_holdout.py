"""Splits: every image on exactly one side, the same ones with the same seed, whatever the loader is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

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


def test_images_that_a_sampler_leaves_out_are_on_neither_side() -> None:
    dataset, chosen = numbered(40).dataset, [3, 5, 8, 13, 21, 34, 1, 2]
    split = split_holdout(DataLoader(dataset, batch_size=3, sampler=SubsetRandomSampler(chosen)), 0.25)
    assert sorted(ids(split.training) + ids(split.holdout)) == sorted(chosen) and split.sizes == (6, 2)
    assert sorted(ids(split.scoring)) == sorted(ids(split.training))


def test_every_process_of_a_distributed_sampler_splits_the_whole() -> None:
    dataset: Any = numbered(20).dataset
    loaders = [DataLoader(dataset, batch_size=3, sampler=DistributedSampler(dataset, 2, rank)) for rank in (0, 1)]
    held = [ids(split_holdout(loader, 0.25).holdout) for loader in loaders]
    assert held[0] == held[1] == ids(split_holdout(numbered(20), 0.25).holdout)


@pytest.mark.parametrize(
    "make", [lambda data: WeightedRandomSampler([0.5] * 20, 20), lambda data: RandomSampler(data, replacement=True)]
)
def test_a_sampler_that_repeats_images_is_refused(make: Any) -> None:
    dataset = numbered(20).dataset
    with pytest.raises(DataError, match=r"draws every image once, got one with a .*RandomSampler"):
        split_holdout(DataLoader(dataset, batch_size=3, sampler=make(dataset)))


@pytest.mark.parametrize("loader", [[], [(torch.zeros(2, 1), torch.zeros(2))], [("a", "b")]])
def test_data_that_cannot_be_split_is_a_clear_error(loader: Any) -> None:
    with pytest.raises(DataError, match="expected"):
        split_holdout(loader)


@pytest.mark.parametrize(
    "loader",
    [
        [(torch.zeros(4, 1), torch.zeros(6))],
        [(torch.zeros(4, 1), torch.zeros(3)), (torch.zeros(4, 1), torch.zeros(5))],
        [{"image": torch.zeros(4, 1), "boxes": torch.zeros(9, 4)}],
    ],
    ids=["more labels", "as many over all batches", "boxes"],
)
def test_batches_whose_tensors_differ_in_length_are_not_split_askew(loader: Any) -> None:
    with pytest.raises(DataError, match="of one length"):
        split_holdout(loader)


class Unopened(Dataset[Any]):
    """Images that a worker can read once it was prepared for them."""

    opened = False

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if not Unopened.opened:
            raise OSError("not open")
        return torch.zeros(1), index


def open_images(_: int) -> None:
    Unopened.opened = True


def test_workers_are_prepared_as_the_loaders_own() -> None:
    split = split_holdout(DataLoader(Unopened(), batch_size=2, num_workers=1, worker_init_fn=open_images))
    assert sorted(ids(split.training) + ids(split.holdout)) == list(range(8))


def test_a_data_set_that_does_not_say_how_long_it_is() -> None:
    class Endless(Dataset[Any]):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(1), index

    with pytest.raises(DataError, match="expected a data set with a length"):
        split_holdout(DataLoader(Endless(), batch_size=2))


@pytest.mark.parametrize("as_list", [False, True])
def test_a_holdout_leaves_images_on_both_sides(as_list: bool) -> None:
    loader: Any = list(numbered(50)) if as_list else numbered(50)
    assert split_holdout(loader, 0.98).sizes == (1, 49)
    with pytest.raises(DataError, match=r"leaves images to train on, got 0\.999 of 50 images"):
        split_holdout(loader, 0.999)
    for fraction in (0.0, 1.0, -0.1, float("nan"), "0.1", None):
        with pytest.raises(DataError, match="expected a holdout above 0 and below 1"):
            split_holdout(loader, fraction)  # type: ignore[arg-type]
