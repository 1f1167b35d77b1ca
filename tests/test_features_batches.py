"""Batches cut into chunks: the chunks are the data, whatever the batch size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diplugin.errors import DataError, UserError
from diplugin.features import chunks, first_images


def numbered(total: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """A loader whose images and labels say which ones they are."""
    ids = torch.arange(total)
    return list(zip((10 * ids).split(batch), ids.split(batch), strict=True))


def test_first_images_end_within_a_batch() -> None:
    ids = torch.arange(10)
    batches = [{"x": part, "name": "kept", "y": part * 2} for part in ids.split(4)]
    found = list(first_images(batches, 6))
    assert torch.equal(torch.cat([b["x"] for b in found]), ids[:6])
    assert torch.equal(torch.cat([b["y"] for b in found]), ids[:6] * 2)
    assert [b["name"] for b in found] == ["kept", "kept"]
    assert len(list(first_images(batches, 4))) == 1
    assert len(list(first_images(batches, 99))) == 3
    rest = iter(batches)
    assert len(list(first_images(rest, 4))) == 1 and len(list(rest)) == 2  # no batch more is read
    assert list(first_images(batches, 0)) == []


def test_batches_that_cannot_be_cut_come_whole() -> None:
    uneven = [(torch.zeros(3), torch.zeros(5))] * 2
    assert [len(x) for x, _ in first_images(uneven, 4)] == [3, 3]


@given(total=st.integers(1, 90), batch=st.integers(1, 100), size=st.integers(1, 30))
def test_chunks_are_the_data_in_order(total: int, batch: int, size: int) -> None:
    got = list(chunks(numbered(total, batch), size))
    assert torch.equal(torch.cat([labels for _, labels in got]), torch.arange(total))
    assert all(torch.equal(images, 10 * labels) for images, labels in got)
    lengths = [len(labels) for _, labels in got]
    assert all(length == size for length in lengths[:-1])
    assert lengths[-1] < size + size / 2
    assert lengths[-1] >= size / 2 or len(lengths) == 1


@given(total=st.integers(1, 90), batches=st.tuples(st.integers(1, 100), st.integers(1, 100)), size=st.integers(1, 30))
def test_chunks_do_not_know_the_batch_size(total: int, batches: tuple[int, int], size: int) -> None:
    one, two = ([labels.tolist() for _, labels in chunks(numbered(total, b), size)] for b in batches)
    assert one == two


def test_a_short_tail_joins_the_chunk_before() -> None:
    lengths = {n: [len(y) for _, y in chunks(numbered(n, 7), 10)] for n in (4, 10, 14, 15, 24, 25)}
    assert lengths == {4: [4], 10: [10], 14: [14], 15: [10, 5], 24: [10, 14], 25: [10, 10, 5]}


def test_dicts_and_nested_batches_are_cut_too() -> None:
    batch = {"image": torch.arange(6), "more": [torch.arange(6) + 1]}
    got = list(chunks([batch, batch], 4))
    assert [len(b["image"]) for b in got] == [4, 4, 4]
    assert got[1]["image"].tolist() == [4, 5, 0, 1]
    assert got[1]["more"][0].tolist() == [5, 6, 1, 2]


@pytest.mark.parametrize("batch", [(torch.zeros(4, 3), [{"boxes": 1}] * 4), (torch.zeros(4, 3), 5), "text", ()])
def test_batches_that_cannot_be_cut_pass_as_they_are(batch: Any) -> None:
    assert list(chunks([batch, batch], 3)) == [batch, batch]


def test_images_and_labels_of_different_length() -> None:
    with pytest.raises(DataError, match=r"one length in a batch, got lengths \[3, 4\]"):
        list(chunks([(torch.zeros(4, 3), torch.zeros(3))], 250))


def test_batches_of_different_shapes() -> None:
    with pytest.raises(DataError, match="batches of one shape"):
        list(chunks([(torch.zeros(4, 3), torch.zeros(4)), (torch.zeros(4, 5), torch.zeros(4))], 250))


@pytest.mark.parametrize("size", [0, -3])
def test_chunks_of_nothing(size: int) -> None:
    with pytest.raises(UserError, match="chunk"):
        next(chunks(numbered(5, 2), size))
